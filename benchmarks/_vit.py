"""The accuracy of a small ViT on images of stripes, and channels made unlike: an image model to quantise."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from modelwright.core.labels import stripes


@torch.no_grad()
def accuracy(module: Any, count: int = 1024, seed: int = 1, noise: float = 2.0) -> float:
    """The share of new images that are given their class."""
    examples = stripes(count, seed, noise)
    return float((module(pixel_values=examples.images).logits.argmax(-1) == examples.labels).float().mean())


def uneven(module: nn.Module, spread: float = 1.0, seed: int = 3) -> None:
    """Give the channels that norms make unlike ranges and middles, as those of large ViTs have; what the model computes stays."""
    from modelwright.anatomy._folding import apply_fold, apply_shift, folds

    generator = torch.Generator().manual_seed(seed)
    for fold in folds(module):
        if fold.kind == "norm":
            width = len(fold.makers[0][2])
            apply_shift(module, fold, 2 * spread * torch.randn(width, generator=generator))
            apply_fold(module, fold, (spread * torch.randn(width, generator=generator)).exp())

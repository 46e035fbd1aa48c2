"""A small ViT, trained in seconds on images of stripes, and its accuracy: an image model to quantise."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SIDE, ANGLES = 16, 5  # pixels; classes are the angles of the stripes, in each of two pairs of colours
SIZES = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4, image_size=SIDE, patch_size=4)


def images(count: int, seed: int, noise: float = 2.0) -> tuple[Tensor, Tensor]:
    """Waves of random length and phase behind noise [count, 3, 16, 16], and their classes [count]."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 2 * ANGLES, (count,), generator=generator)
    phase, length = (torch.rand(count, 1, 1, generator=generator) for _ in range(2))
    angle = ((labels % ANGLES) * torch.pi / ANGLES)[:, None, None]
    rows, columns = torch.meshgrid(torch.arange(float(SIDE)), torch.arange(float(SIDE)), indexing="ij")
    wave = torch.sin((0.9 + 0.3 * length) * (columns * angle.cos() + rows * angle.sin()) + 2 * torch.pi * phase)
    colour = torch.stack([torch.ones(count), (labels >= ANGLES) * 2.0 - 1, -torch.ones(count)], 1)
    return wave[:, None] * colour[:, :, None, None] + noise * torch.randn(count, 3, SIDE, SIDE, generator=generator), labels


def trained(steps: int, noise: float = 2.0, batch: int = 64) -> nn.Module:
    """A ViT trained on new images at every step; the same arguments give the same model."""
    from transformers import ViTConfig, ViTForImageClassification

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = ViTForImageClassification(ViTConfig(**SIZES, num_labels=2 * ANGLES))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, steps)
    for step in range(steps):
        pixels, labels = images(batch, 1000 + step, noise)
        loss = F.cross_entropy(model(pixel_values=pixels).logits, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


@torch.no_grad()
def accuracy(module: Any, count: int = 1024, seed: int = 1, noise: float = 2.0) -> float:
    """The share of new images that are given their class."""
    pixels, labels = images(count, seed, noise)
    return float((module(pixel_values=pixels).logits.argmax(-1) == labels).float().mean())


def uneven(module: nn.Module, spread: float = 1.0, seed: int = 3) -> None:
    """Give the channels that norms make unlike ranges and middles, as those of large ViTs have; what the model computes stays."""
    from modelwright.anatomy._folding import apply_fold, apply_shift, folds

    generator = torch.Generator().manual_seed(seed)
    for fold in folds(module):
        if fold.kind == "norm":
            width = len(fold.makers[0][2])
            apply_shift(module, fold, 2 * spread * torch.randn(width, generator=generator))
            apply_fold(module, fold, (spread * torch.randn(width, generator=generator)).exp())

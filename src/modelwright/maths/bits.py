"""Truth values in bits: entry 8k + j of the last axis in bit j of byte k."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad


def packed(mask: Tensor) -> Tensor:
    """bool [..., n] -> uint8 [..., ceil(n / 8)]; the last byte is filled with zeros."""
    if mask.device.type == "cpu":
        return torch.from_numpy(np.packbits(mask.numpy(), axis=-1, bitorder="little"))
    bits = pad(mask.to(torch.uint8), (0, -mask.shape[-1] % 8)).unflatten(-1, (-1, 8))
    return (bits << _places(bits)).sum(-1, dtype=torch.uint8)


def unpacked(bits: Tensor, count: int) -> Tensor:
    """uint8 [..., m] -> the first `count` entries, bool [..., count]."""
    if bits.device.type == "cpu":
        return torch.from_numpy(np.unpackbits(bits.numpy(), axis=-1, count=count, bitorder="little").view(bool))
    return ((bits.unsqueeze(-1) >> _places(bits)) & 1).flatten(-2)[..., :count].bool()


def _places(like: Tensor) -> Tensor:
    return torch.arange(8, dtype=torch.uint8, device=like.device)

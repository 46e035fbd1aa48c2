"""Truth values in bits: entry 8k + j of the last axis in bit j of byte k, or with order "big" in bit 7 - j."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

Order = Literal["little", "big"]


def packed(mask: Tensor, order: Order = "little") -> Tensor:
    """bool [..., n] -> uint8 [..., ceil(n / 8)]; the last byte is filled with zeros."""
    if mask.device.type == "cpu":
        return torch.from_numpy(np.packbits(mask.numpy(), axis=-1, bitorder=order))
    bits = pad(mask.to(torch.uint8), (0, -mask.shape[-1] % 8)).unflatten(-1, (-1, 8))
    return (bits << _places(bits, order)).sum(-1, dtype=torch.uint8)


def unpacked(bits: Tensor, count: int, order: Order = "little") -> Tensor:
    """uint8 [..., m] -> the first `count` entries, bool [..., count]."""
    if bits.device.type == "cpu":
        return torch.from_numpy(np.unpackbits(bits.numpy(), axis=-1, count=count, bitorder=order).view(bool))
    return ((bits.unsqueeze(-1) >> _places(bits, order)) & 1).flatten(-2)[..., :count].bool()


def _places(like: Tensor, order: Order) -> Tensor:
    places = torch.arange(8, dtype=torch.uint8, device=like.device)
    return places if order == "little" else places.flip(0)

"""Whole numbers between the least and the greatest value of a group: value = code · scale + low, for values that keep coming in."""

from __future__ import annotations

import torch
from torch import Tensor

from modelwright.maths.rounding import pack_bytes, unpack_bytes


def cut(values: Tensor, bits: int, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """Round values [..., n] in groups of consecutive ones; bits: 1 to 8, group · bits a multiple of 8, n one of the group.

    Returns (codes as a dense stream, uint8 [..., n · bits / 8]; scale and low [..., n / group] in the values' dtype).
    scale = (greatest - least) / (2^bits - 1), low = least. Codes are found with the scale as it is stored.
    Source: Liu et al. 2024, arXiv:2402.02750, equation 1.
    """
    grouped = values.unflatten(-1, (-1, group)).float()
    low, high = grouped.amin(-1, keepdim=True), grouped.amax(-1, keepdim=True)
    scale = ((high - low) / (2**bits - 1)).to(values.dtype)
    step = torch.where(scale > 0, scale, 1).float()  # a group of one value is its least one
    codes = ((grouped - low) / step).round_().clamp_(max=2**bits - 1)
    rows = pack_bytes(codes.to(torch.uint8).reshape(-1, values.shape[-1]), bits)
    return rows.reshape(*values.shape[:-1], -1), scale.squeeze(-1), low.squeeze(-1).to(values.dtype)


def filled(codes: Tensor, scale: Tensor, low: Tensor, bits: int) -> Tensor:
    """The values that `cut` stored, [..., n] in scale's dtype."""
    count = codes.shape[-1] * 8 // bits
    whole = unpack_bytes(codes.reshape(-1, codes.shape[-1]), bits, count).float()
    grouped = whole.view(*scale.shape, -1)
    return (grouped * scale.unsqueeze(-1).float() + low.unsqueeze(-1).float()).flatten(-2).to(scale.dtype)

"""Inputs that are rounded by steps known beforehand, and columns of a matrix that are halved, or cut further, by reading an input twice.

Source: Wang et al. 2025, arXiv:2503.07654 (MergeQuant).
"""

from __future__ import annotations

import torch
from torch import Tensor

CLIPS = tuple(1 - 0.05 * number for number in range(11))  # 1.00, 0.95, ..., 0.50 of a range


def most(bits: int) -> int:
    """The largest whole number of a symmetric grid."""
    return 2 ** (bits - 1) - 1


def rounded(inputs: Tensor, bits: int) -> Tensor:
    """The nearest whole numbers, float32, of inputs that are counted in steps; what lies outside is clipped."""
    return inputs.float().round().clamp(-most(bits), most(bits))


def steps(largest: Tensor, clip: float, bits: int) -> Tensor:
    """clip · max|x| / (2^(bits-1) - 1) for each channel [in]; channels that were always 0 have the least of the others', or 1."""
    live = largest[largest > 0]
    least = live.min() if len(live) else torch.ones((), device=largest.device) * most(bits)
    return clip * torch.where(largest > 0, largest, least) / most(bits)


def reconstruction(sizes: Tensor, importance: Tensor, deviations: float) -> tuple[Tensor, Tensor]:
    """Which input each column is to read, and the share of that input's column which it has: (int64 [in], float32 [in]).

    sizes, importance: of the columns [in]. A column above θ = mean + deviations · their standard deviation becomes ⌈size / θ⌉ columns
    of equal shares, in the places of as many of the least importance among those that are not above it; θ doubles until these suffice.
    """
    sizes = sizes.float()
    bound = sizes.mean() + deviations * sizes.std(correction=0)
    while True:
        ways = torch.where(sizes > bound, (sizes / bound.clamp(min=torch.finfo(sizes.dtype).tiny)).ceil(), 1.0).long()
        more = int((ways - 1).sum())
        if more <= int((ways == 1).sum()):
            break
        bound = bound * 2
    order = importance.float().masked_fill(ways > 1, torch.inf).argsort(stable=True)
    count = ways.clone()
    count[order[:more]] = 0
    read = torch.arange(len(sizes), device=sizes.device).repeat_interleave(count)
    return read, 1 / ways[read].float()

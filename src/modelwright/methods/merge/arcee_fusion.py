"""Take over only those of one donor's changes that stand out: Arcee Fusion.

As mergekit's `arcee_fusion`: the importance of an entry is |Δ| times the divergence KL(softmax(donor's row) ‖
softmax(model's row)); what is above the median plus 1.5 interquartile ranges of its tensor is taken over.
Differs: divergences are computed from the change, because those of a fine-tuned model's rows, as mergekit has them in float32, are
mostly rounding; quantiles are exact in tensors of any size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from modelwright.maths.masks import quantiles
from modelwright.maths.slices import Entries, Sliced, flat
from modelwright.maths.task_vectors import delta, of_rows, spread
from modelwright.methods.merge._mechanism import PointWise

FAR = 1.5  # interquartile ranges above the median, from which an entry stands out


@dataclass(frozen=True, kw_only=True)
class ArceeFusion(PointWise):
    """Replace the weights whose change stands out in size and in its row's distribution; all others stay the model's."""

    status: ClassVar[str] = "checked"
    base_apart: ClassVar[bool] = True
    takes: ClassVar[tuple[int, int | None]] = (1, 1)

    def tensor(self, weight: Entries, donors: list[Entries]) -> Sliced:
        shape, count = tuple(weight.shape), math.prod(weight.shape)
        width = shape[-1] if shape else 1
        start, donor = flat(weight), flat(donors[0])
        if not count:
            return Sliced(shape, weight.dtype, start)
        change, apart = delta(weight, donors[0]), spread(of_rows([start, donor], width, count, divergence), width)

        def scores(at: slice) -> Tensor:
            return change(at).abs_().mul_(apart(at))

        low, middle, high = quantiles(scores, count, (0.25, 0.5, 0.75))
        least = middle + FAR * (high - low)

        def values(at: slice) -> Tensor:
            taken = scores(at).ge_(least)  # 1 or 0, with which lerp gives either end exactly, and faster than where
            return torch.lerp(start(at).to(taken.dtype), donor(at).to(taken.dtype), taken)

        return Sliced(shape, weight.dtype, values)


def divergence(before: Tensor, after: Tensor) -> Tensor:
    """KL(softmax(after) ‖ softmax(before)) of each row [rows, width] -> [rows].

    From the change δ less its mean, under p = softmax(before): (E[δ²] + E[δ·g])/(1 + E[g]) - log(1 + E[g]), g = e^δ - 1 - δ.
    Every term is as small as the result, so that nothing is lost in the rounding of larger ones.
    """
    kind = torch.promote_types(before.dtype, torch.float32)
    before, share = before.to(kind), before.to(kind).softmax(-1)
    change = after.to(kind) - before
    change -= (share * change).sum(-1, keepdim=True)
    rest = _beyond_linear(change)
    more = (share * rest).sum(-1)
    return (share * change * (change + rest)).sum(-1) / (1 + more) - more.log1p()


def _beyond_linear(x: Tensor) -> Tensor:
    """e^x - 1 - x, by its series where x is small."""
    series = x * x * (1 / 2 + x * (1 / 6 + x * (1 / 24 + x * (1 / 120 + x / 720))))
    small = x.abs() < 0.25
    return series if small.all() else torch.where(small, series, x.expm1() - x)

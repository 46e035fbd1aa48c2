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

from modelwright.maths._kernels import kernels
from modelwright.maths.masks import quantiles
from modelwright.maths.slices import Entries, Sliced, flat, halves
from modelwright.maths.task_vectors import delta, of_rows, spread
from modelwright.methods.merge._mechanism import PointWise

FAR = 1.5  # interquartile ranges above the median, from which an entry stands out
SMALL = 0.25  # changes up to which a series is taken; beyond, e^x - 1 - x is exact enough as it stands


@dataclass(frozen=True, kw_only=True)
class ArceeFusion(PointWise):
    """Replace the weights whose change stands out in size and in its row's distribution; all others stay the model's."""

    status: ClassVar[str] = "checked"
    carries: ClassVar[bool] = True
    base_apart: ClassVar[bool] = True
    takes: ClassVar[tuple[int, int | None]] = (1, 1)

    def tensor(self, weight: Entries, donors: list[Entries]) -> Sliced:
        shape, count = tuple(weight.shape), math.prod(weight.shape)
        width = shape[-1] if shape else 1
        start, donor = flat(weight), flat(donors[0])
        if not count:
            return Sliced(shape, weight.dtype, start)
        apart = of_rows([start, donor], width, count, divergence)
        change, of_row, loops = delta(weight, donors[0]), spread(apart, width), kernels("_entry_kernels")

        def scores(at: slice) -> Tensor:
            if loops and (both := halves([start(at), donor(at)])):
                found = torch.empty(at.stop - at.start)
                loops.sizes(*both, apart.numpy(), width, at.start, found.numpy())
                return found
            return change(at).abs_().mul_(of_row(at))

        low, middle, high = quantiles(scores, count, (0.25, 0.5, 0.75))
        least = middle + FAR * (high - low)

        def values(at: slice) -> Tensor:
            found, before, after = scores(at), start(at), donor(at)
            if loops and (both := halves([before, after])):
                out = torch.empty_like(before)
                loops.chosen(found.numpy(), least, *both, *halves([out]))
                return out
            return torch.where(found >= least, after, before.masked_fill(~(found < least), math.nan))

        return Sliced(shape, weight.dtype, values)


def divergence(before: Tensor, after: Tensor) -> Tensor:
    """KL(softmax(after) ‖ softmax(before)) of each row [rows, width] -> [rows].

    From the change δ less its mean, under p = softmax(before): E[δ(δ + g)]/(1 + E[g]) - log(1 + E[g]), g = e^δ - 1 - δ.
    Every term is as small as the result, so that nothing is lost in the rounding of larger ones.
    """
    if (loops := kernels("_entry_kernels")) and (both := halves([before, after])):
        found = torch.empty(len(before))
        loops.divergences(*both, before.float().softmax(-1).numpy(), found.numpy())
        return found
    kind = torch.promote_types(before.dtype, torch.float32)
    share, change = before.to(kind), after.to(kind, copy=True)
    change.sub_(share)
    share = share.softmax(-1)
    change.sub_(_mean(change, share)[:, None])
    rest = _beyond_linear(change)
    more = _mean(rest, share)
    return _mean(rest.add_(change).mul_(change), share) / (1 + more) - more.log1p()


def _mean(values: Tensor, share: Tensor) -> Tensor:
    return torch.linalg.vecdot(values, share)


def _beyond_linear(x: Tensor) -> Tensor:
    """e^x - 1 - x, where x is small by so many terms of its series that the next one is below its rounding."""
    far = x.abs().max().item()
    size, last, least = min(far, SMALL), 2, torch.finfo(x.dtype).eps / 4
    while 2 * size ** (last - 1) / math.factorial(last + 1) > least:  # the next term over the first
        last += 1
    series = torch.full_like(x, 1 / math.factorial(last))
    for order in range(last - 1, 1, -1):
        series.mul_(x).add_(1 / math.factorial(order))
    series.mul_(x).mul_(x)
    return series if far <= SMALL else torch.where(x.abs() <= SMALL, series, x.expm1() - x)

"""Take over only those of one donor's changes that stand out: Arcee Fusion.

As mergekit's `arcee_fusion`: the importance of an entry is |Δ| times the divergence KL(softmax(donor's row) ‖
softmax(model's row)); what is above the median plus 1.5 interquartile ranges of its tensor is taken over.
Differs: divergences are computed in float64, because in float32, as mergekit has them, those of a fine-tuned model's rows are mostly
rounding; quantiles are exact in tensors of any size.
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
    of_changes: ClassVar[bool] = True
    takes: ClassVar[tuple[int, int | None]] = (1, 1)

    def tensor(self, weight: Entries, donors: list[Entries]) -> Sliced:
        shape, count = tuple(weight.shape), math.prod(weight.shape)
        width = shape[-1] if shape else 1
        start, donor = flat(weight), flat(donors[0])
        if not count:
            return Sliced(shape, weight.dtype, start)
        change, apart = delta(start, donor), spread(of_rows([start, donor], width, count, divergence), width)

        def scores(at: slice) -> Tensor:
            return change(at).abs_().mul_(apart(at))

        low, middle, high = quantiles(scores, count, (0.25, 0.5, 0.75))
        least = middle + FAR * (high - low)

        def values(at: slice) -> Tensor:
            return torch.where(scores(at) >= least, donor(at), start(at))

        return Sliced(shape, weight.dtype, values)


def divergence(before: Tensor, after: Tensor) -> Tensor:
    """KL(softmax(after) ‖ softmax(before)) of each row [rows, width] -> [rows]."""
    before, after = before.double(), after.double()  # in float32 the divergence of nearby rows is lost in its own rounding
    old, new = before.log_softmax(-1), after.log_softmax(-1)
    return (new.exp() * (new - old)).sum(-1).float()

"""Select entries on which donors differ, weigh donors by the size of their changes, erase minorities: SCE.

Wan et al. 2024 (FuseChat), arXiv:2408.07990, section 3.3; the shares and ties as in mergekit's `sce`. Of the entries whose variance
over the donors is not 0, the int(keep · n) with the largest stay; a donor's weight in a tensor is the mean square of what
stays of its changes, over the sum of all donors'; only changes with the sign of the unweighted sum count.
Differs: of entries that tie in variance the last stay.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from modelwright.core.settings import fraction
from modelwright.maths.masks import find_cut
from modelwright.maths.slices import Entries, Sliced, each, flat
from modelwright.maths.task_vectors import changes, combined, elect
from modelwright.methods.merge._mechanism import PointWise


@dataclass(frozen=True, kw_only=True)
class Sce(PointWise):
    """Merge the changes on which donors differ most, each donor weighted, tensor by tensor, by how much it changed."""

    status: ClassVar[str] = "checked"
    on_changes: ClassVar[bool] = True
    base_apart: ClassVar[bool] = True
    neutral = dict(keep=0.0)

    keep: float = fraction(1.0)  # of the entries on which donors differ

    def tensor(self, weight: Entries, donors: list[Entries]) -> Sliced:
        start, count = flat(weight), math.prod(weight.shape)
        added = changes(weight, donors)

        def variance(at: slice) -> Tensor:
            return apart([change(at) for change in added])

        differ = sum(each(lambda at: int(variance(at).count_nonzero()), count)) if self.keep < 1 else 0
        cut = find_cut(variance, count, count - int(self.keep * differ)) if self.keep < 1 else None

        def selected(at: slice) -> list[Tensor]:
            parts = [change(at) for change in added]
            if cut is None:
                return parts
            kept = cut.before(apart(parts), at).sub_(1).neg_()
            return [part.mul_(kept) for part in parts]

        squares = each(lambda at: [float(part.square().sum(dtype=torch.float64)) for part in selected(at)], count)
        sizes = torch.tensor([[0.0] * len(donors), *squares], dtype=torch.float64).sum(0)
        weights = (sizes / sizes.sum().clamp(min=1e-300)).tolist()

        def values(at: slice) -> Tensor:
            parts = selected(at)
            sign = elect(parts)
            return combined([part.mul_(share) for part, share in zip(parts, weights, strict=True)], weights, sign, True).add_(start(at))

        return Sliced(tuple(weight.shape), weight.dtype, values)


def apart(parts: list[Tensor]) -> Tensor:
    """The variance at each entry [n] over parts, as a mean square; exactly 0 where all are equal."""
    gaps = [part - parts[0] for part in parts[1:]]
    mean = torch.zeros_like(parts[0])
    for gap in gaps:
        mean.add_(gap, alpha=1 / len(parts))
    total = mean.square()
    for gap in gaps:
        gap.sub_(mean)
        total.addcmul_(gap, gap)
    return total.div_(len(parts))

"""Zero weights column by column, and let the columns still to come make up for it.

Frantar, Alistarh 2023, arXiv:2301.00774, algorithm 1 (optimal brain surgeon with a shared inverse Hessian).
Differs: the damping is raised tenfold when the factorisation fails; the mask of a block of columns has exactly the
asked number of zeros, also where scores tie.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from modelwright.core.settings import count, number
from modelwright.core.statistics import Statistics
from modelwright.maths import second_order
from modelwright.maths.masks import part_of
from modelwright.methods.prune._mechanism import LayerPruner


@dataclass(frozen=True, kw_only=True)
class SparseGpt(LayerPruner):
    """Zero `sparsity` of the weights where the layer's output minds least, and update those that stay."""

    status: ClassVar[str] = "checked"
    gathers: ClassVar[tuple[str, ...]] = ("moment",)
    solves: ClassVar[bool] = True
    neutral = dict(sparsity=0.0)

    damp: float = number(0.01, low=0)  # added to the moment's diagonal, as a share of its mean
    columns: int = count(128, unit="columns")  # whose mask is chosen together

    def prune(self, weight: Tensor, statistics: Statistics) -> Tensor:
        if not self.pattern and not self.sparsity:
            return weight
        inverse, dead, _ = statistics.inverse_factor(self.damp)
        pattern = (self.pattern.keep, self.pattern.of) if self.pattern else None
        choose = second_order.zeroed(inverse, self.sparsity, pattern=pattern)
        return second_order.sweep(weight, inverse, choose, dead=dead, block=self.columns)[0]

    def zeros(self, rows: int, columns: int) -> int:
        if self.pattern:
            return super().zeros(rows, columns)
        widths = [min(self.columns, columns - start) for start in range(0, columns, self.columns)]
        return sum(part_of(self.sparsity, rows * width) for width in widths)

    def problems(self) -> list[str]:
        found = super().problems()
        if self.pattern and second_order.LEAF % self.pattern.of:
            return [*found, f"the pattern {self.pattern} was asked for; runs are of 1, 2, 4, 8, 16 or 32 columns here."]
        if self.pattern and isinstance(self.columns, int) and self.columns % self.pattern.of:
            cut = f"blocks of {self.columns} columns cut the runs of the pattern {self.pattern}. Use a multiple of {self.pattern.of}."
            return [*found, cut]
        return found

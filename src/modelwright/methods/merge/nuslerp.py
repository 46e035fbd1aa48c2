"""Go from one donor to another along the arc, by weights, or interpolate what they learned: NuSLERP.

mergekit's `nuslerp`, after Shoemake 1985, section 3.3: t = w₂/(w₁ + w₂), ½ where the weights cancel.
Differs: `by_row` means a row of a matrix, its weights of one output (mergekit: nuslerp_flatten: false), and `by_column` a
column, its weights of one input (mergekit: nuslerp_row_wise: true besides). Angles and sums are float64.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from modelwright.maths import spherical
from modelwright.maths.slices import Entries, Sliced
from modelwright.methods.merge._mechanism import Spherical


@dataclass(frozen=True, kw_only=True)
class Nuslerp(Spherical):
    """Interpolate between two donors on the sphere; `from_base` interpolates their changes of the model instead."""

    status: ClassVar[str] = "checked"
    takes: ClassVar[tuple[int, int | None]] = (2, 2)

    by_row: bool = False  # each row of a matrix has an angle of its own
    by_column: bool = False  # each column of a matrix has an angle of its own

    def problems(self) -> list[str]:  # weights that cancel mean the middle
        return ["by_row and by_column are two ways to cut a matrix. Choose one."] if self.by_row and self.by_column else []

    def tensor(self, weight: Entries, donors: list[Entries]) -> Sliced:
        first, second = self.weights_for(len(donors))
        t = second / (first + second) if abs(first + second) > 1e-6 else 0.5
        base = weight if self.from_base else None
        ways = {"by_row": self.by_row, "by_column": self.by_column}
        return spherical.mean(donors, lambda gram: spherical.slerp(gram, t), weight.dtype, base=base, **ways)

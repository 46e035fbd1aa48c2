"""Take the middle of any number of donors on the sphere: the Karcher mean.

Karcher 1977, "Riemannian center of mass", definition 1.3; Afsari 2011, section 1; for models as in mergekit's `karcher`:
each tensor is one vector, whose direction is the one with the least weighted sum of squared angles to the donors', and
whose length is the weighted mean of theirs. Of two donors it is `merge.slerp` half way when they are equally long.
Differs: donors may have weights, and changes of the model may be averaged. The iteration runs on the donors' dot products,
in float64.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from modelwright.core.settings import count, number
from modelwright.maths import spherical
from modelwright.maths.slices import Entries, Sliced
from modelwright.methods.merge._mechanism import Spherical


@dataclass(frozen=True, kw_only=True)
class Karcher(Spherical):
    """Average the donors' directions and lengths apart, so that donors that differ much do not shrink each other."""

    status: ClassVar[str] = "checked"

    iterations: int = count(10)  # at most
    tolerance: float = number(1e-5, low=0, unit="radians")  # ends with the first step that is shorter

    def tensor(self, weight: Entries, donors: list[Entries]) -> Sliced:
        return spherical.mean(
            donors,
            lambda gram: spherical.karcher_mean(gram, self.shares(len(donors)), self.iterations, self.tolerance),
            weight.dtype,
            base=weight if self.from_base else None,
        )

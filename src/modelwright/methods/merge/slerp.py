"""Go from the model to one donor along the arc: SLERP.

Shoemake 1985, "Animating rotation with quaternion curves", section 3.3; for models as in mergekit's `slerp`: each tensor
is one vector, the angle is that between the two directions, and lengths are interpolated with them. A gradient over depth
is a list: `t: [0, 0.5, 1]`.
Differs: angles and sums are float64.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from modelwright.core.settings import fraction
from modelwright.maths import spherical
from modelwright.maths.slices import Entries, Sliced
from modelwright.methods.merge._mechanism import PointWise

STRAIGHT = 0.9995  # the cosine from which an arc is taken for a line, as in mergekit


@dataclass(frozen=True, kw_only=True)
class Slerp(PointWise):
    """Interpolate between the model and one donor without losing length, as a straight line between directions does."""

    status: ClassVar[str] = "checked"
    takes: ClassVar[tuple[int, int | None]] = (1, 1)
    neutral = dict(t=0.0)

    t: float = fraction(0.5)  # 0 is the model, 1 the donor

    def tensor(self, weight: Entries, donors: list[Entries]) -> Sliced:
        return spherical.mean([weight, *donors], lambda gram: spherical.slerp(gram, self.t, STRAIGHT), weight.dtype)

"""Take over one donor's weights where they are near the model's, and step towards them elsewhere.

As mergekit's `nearswap`: the donor counts min(1, t/|b - a|) at each entry, so that no entry moves by more than t:
a + max(-t, min(t, b - a)) = max(a - t, min(a + t, b)).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from modelwright.core.settings import number
from modelwright.maths.slices import Entries, Sliced, flat
from modelwright.maths.task_vectors import wide
from modelwright.methods.merge._mechanism import PointWise


@dataclass(frozen=True, kw_only=True)
class Nearswap(PointWise):
    """Move every weight towards the donor's by at most `t`: small differences are adopted, large ones hardly."""

    status: ClassVar[str] = "checked"
    takes: ClassVar[tuple[int, int | None]] = (1, 1)
    neutral = dict(t=0.0)

    t: float = number(1e-3, low=0)  # the largest step of a weight

    def tensor(self, weight: Entries, donors: list[Entries]) -> Sliced:
        start, donor, kind = flat(weight), flat(donors[0]), wide(weight, donors[0])

        def values(at: slice) -> torch.Tensor:
            low = start(at).to(kind, copy=True)
            high = low + self.t
            return torch.clamp(donor(at).to(kind), low.sub_(self.t), high, out=high)

        return Sliced(tuple(weight.shape), weight.dtype, values)

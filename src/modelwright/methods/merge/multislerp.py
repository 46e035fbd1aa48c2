"""Average directions and lengths of any number of donors in one step: multi-SLERP.

mergekit's `multislerp`: a step from the normalised mean of the directions through its tangent space. With weights that sum
to 1 the step there is 0 by construction, so the result is Σ wᵢ‖vᵢ‖ · (Σ wᵢv̂ᵢ)/‖Σ wᵢv̂ᵢ‖, which is what is computed.
Differs: weights are always divided by their sum. `merge.karcher` goes on from here to the true mean.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from modelwright.maths import spherical
from modelwright.maths.slices import Entries, Sliced
from modelwright.methods.merge._mechanism import Spherical


@dataclass(frozen=True, kw_only=True)
class Multislerp(Spherical):
    """Give the mean of the donors' directions the mean of their lengths; nearly `merge.karcher` and without iterations."""

    status: ClassVar[str] = "checked"

    def tensor(self, weight: Entries, donors: list[Entries]) -> Sliced:
        shares, base = self.shares(len(donors)), weight if self.from_base else None
        return spherical.mean(donors, lambda gram: spherical.tangent_mean(gram, shares), weight.dtype, base=base)

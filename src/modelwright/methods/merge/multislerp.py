"""Average directions and lengths of any number of donors in one step: multi-SLERP.

mergekit's `multislerp`: a step from the normalised mean u of the directions through its tangent space. The step is
Σ wᵢ(v̂ᵢ - (v̂ᵢ·u)u) = m - (m·u)u with m = Σ wᵢv̂ᵢ, whatever the weights sum to; u is m/‖m‖, so that it is 0. The result is
Σ wᵢ‖vᵢ‖ · m/‖m‖, which is what is computed. Of two donors whose directions cancel it is Σ wᵢvᵢ, as there.
Differs: of more donors that cancel it is 0, where mergekit stops. `merge.karcher` goes on from here to the true mean.
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

    normalize: bool = True  # divide the weights by their sum; otherwise lengths are summed as the weights say

    def problems(self) -> list[str]:
        return super().problems() if self.normalize else []

    def tensor(self, weight: Entries, donors: list[Entries]) -> Sliced:
        shares = self.shares(len(donors)) if self.normalize else self.weights_for(len(donors))
        base = weight if self.from_base else None
        return spherical.mean(donors, lambda gram: spherical.tangent_mean(gram, shares), weight.dtype, base=base)

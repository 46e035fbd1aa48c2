"""Add whole what one donor alone changed, and the mean of what several did: RAM, for donors trained by reinforcement.

Yuan et al. 2026, arXiv:2601.13572: reinforcement changes few entries, and other ones for each task, so that a mean over all
donors dilutes them. A donor changed an entry when |τᵢ| > ε, `threshold`; an entry that several changed gets the mean of their τᵢ,
one of donor i alone (1 + r·min(shared/unique, α))·τᵢ, with r `boost`, α `most`, and the numbers of i's entries that others
changed too and that none did. `boost: 0.1` is RAM+; mergekit's `ram` and `ramplus_tl`.
Differs: the numbers are those of each tensor, as in mergekit (`scope: model`: of all together).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from modelwright.core.settings import number
from modelwright.maths.slices import Entries, Sliced, each
from modelwright.maths.task_vectors import changes, onto
from modelwright.methods.merge._mechanism import PointWise


@dataclass(frozen=True, kw_only=True)
class Ram(PointWise):
    """Add to the model what each donor alone changed, undiluted, and the mean of what several changed."""

    status: ClassVar[str] = "checked"
    on_changes: ClassVar[bool] = True
    base_apart: ClassVar[bool] = True
    neutral = dict(scale=0.0)

    scale: float = number(1.0)  # of the merged change, λ
    threshold: float = number(1e-5, low=0)  # a donor changed an entry when its change is larger, ε
    boost: float = number(0.0, low=0)  # of what one donor alone changed, for each shared entry to a unique one, r
    most: float = number(0.2, low=0)  # shared entries to a unique one that count at most, α
    scope: Literal["tensor", "model"] = "tensor"  # in which shared and unique entries are counted

    def problems(self) -> list[str]:
        return self.everywhere("threshold", "boost", "most") if self.scope == "model" else []

    def survey(self, weight: Entries, donors: list[Entries]) -> list[float] | None:
        """What each donor's unique changes are multiplied by, when all tensors count."""
        return self.factors(weight, donors) if self.scope == "model" else None

    def tensor(self, weight: Entries, donors: list[Entries], survey: list[float] | None) -> Sliced:
        factors = torch.tensor(survey or self.factors(weight, donors))[:, None]

        def merged(at: slice) -> Tensor:
            parts, changed = self.parts(weight, donors, at)
            parts.mul_(changed)
            times = changed.sum(0)
            alone = parts.mul(factors.to(parts.device)).sum(0)
            return torch.where(times > 1, parts.sum(0).div_(times.clamp(min=1)), alone)

        return onto(weight, merged, self.scale)

    def factors(self, weight: Entries, donors: list[Entries]) -> list[float]:
        """1 + r·min(shared/unique, α) of each donor."""
        if not self.boost:
            return [1.0] * len(donors)

        def counted(at: slice) -> Tensor:
            _, changed = self.parts(weight, donors, at)
            unique = changed & (changed.sum(0) == 1)
            return torch.stack([changed.sum(1), unique.sum(1)])

        nothing = torch.zeros(2, len(donors), dtype=torch.int64)
        changed, unique = sum((one.cpu() for one in each(counted, math.prod(weight.shape))), nothing).double()
        return (1 + self.boost * ((changed - unique) / unique.clamp(min=1e-5)).clamp(max=self.most)).tolist()

    def parts(self, weight: Entries, donors: list[Entries], at: slice) -> tuple[Tensor, Tensor]:
        """The donors' changes at a slice, and where they changed something [donors, n]."""
        parts = torch.stack([change(at) for change in changes(weight, donors)])
        return parts, parts.abs() > self.threshold

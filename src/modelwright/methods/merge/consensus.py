"""Add only changes that several donors need: Consensus Task Arithmetic, by TALL masks.

Wang et al. 2024, arXiv:2405.07813, sections 4 and 5: donor i needs an entry where |τᵢ| > λ·|τ_M - τᵢ|, `least` λ, with the
merged change τ_M; an entry counts when at least k donors need it, `agree` k. k = 2 leaves out what one donor alone needs,
k = 1 only what none does, k = 0 nothing. With `keep`, `consensus` and `normalize` τ_M is that of TIES.
Differs: λ is one number or one for each donor, not searched; a donor's weight multiplies its τᵢ.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from modelwright.core.errors import SettingError
from modelwright.core.settings import count, fraction, number
from modelwright.maths.slices import Entries, Sliced
from modelwright.maths.task_vectors import changes, onto, trimmed
from modelwright.methods.merge._mechanism import SparseTaskVectors, counted


@dataclass(frozen=True, kw_only=True)
class Consensus(SparseTaskVectors):
    """Add the donors' changes at those entries that at least `agree` of them need; selfish and useless changes go."""

    status: ClassVar[str] = "checked"
    neutral = dict(scale=0.0)

    agree: int = count(2, low=0)  # donors that must need an entry, k
    least: float = number(0.4, low=0)  # a donor needs an entry when its change is larger than this times that of the others, λ
    least_each: tuple[float, ...] | None = None  # one for each donor, in the place of `least`
    keep: float = fraction(1.0)  # of each donor's changes

    def tensor(self, weight: Entries, donors: list[Entries]) -> Sliced:
        if self.agree > len(donors):
            raise SettingError(f"{self.name()}: agree={self.agree} of {len(donors)} donors is never reached. Lower it or give more donors.")
        sparsify = [counted(trimmed, keep=keep) for keep in self.keeps(len(donors))]
        merged, own = self.change(weight, donors, sparsify), changes(weight, donors)
        least = self.each(self.least_each, "least_each", len(donors)) or [self.least] * len(donors)

        def needed(at: slice) -> Tensor:
            total = merged(at)
            donors_that_need = torch.zeros_like(total, dtype=torch.int16)
            for part, share, bound in zip(own, self.weights_for(len(donors)), least, strict=True):
                change = part(at).mul_(share)
                donors_that_need += change.abs() > (total - change).abs_().mul_(bound)
            return total.masked_fill_(donors_that_need < self.agree, 0)

        return onto(weight, needed, self.scale)

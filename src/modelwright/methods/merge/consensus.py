"""Add only changes that several donors need: Consensus Task Arithmetic, by TALL masks.

Wang et al. 2024, arXiv:2405.07813, sections 4 and 5: donor i needs an entry where |τᵢ| > λ·|τ_M - τᵢ|, `least` λ, with the
merged change τ_M; an entry counts when at least k donors need it, `agree` k. k = 2 leaves out what one donor alone needs,
k = 1 only what none does, k = 0 nothing. With `keep`, `consensus` and `normalize` τ_M is that of TIES.
`merge.tall_masks` finds λ of each donor on its text, and `pack_tasks` keeps all donors as θ0, τ_M and a bit for each entry.
Differs: λ is one number or one for each donor; a donor's weight multiplies its τᵢ.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from modelwright.core.errors import SettingError
from modelwright.core.settings import count, fraction, number
from modelwright.maths.slices import Entries, Sliced, Values
from modelwright.maths.stitching import needed
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
        self.refuse_too_few(len(donors))
        merged, own, least = self.parts(weight, donors)

        def agreed(at: slice) -> Tensor:
            total = merged(at)
            donors_that_need = torch.zeros_like(total, dtype=torch.int16)
            for change, bound in zip(own, least, strict=True):
                donors_that_need += needed(change(at), total, bound)
            return total.masked_fill_(donors_that_need < self.agree, 0)

        return onto(weight, agreed, self.scale)

    def refuse_too_few(self, donors: int) -> None:
        """Raise SettingError when so many donors can never agree."""
        if self.agree > donors:
            raise SettingError(f"{self.name()}: agree={self.agree} of {donors} donors is never reached. Lower it or give more donors.")

    def refuse_other_numbers(self, donors: int) -> None:
        """Raise SettingError when a setting with a value for each donor has another number of them."""
        self.weights_for(donors)
        self.keeps(donors)
        self.bounds(donors)

    def bounds(self, donors: int) -> list[float]:
        """λ of each donor."""
        return self.each(self.least_each, "least_each", donors) or [self.least] * donors

    def parts(self, weight: Entries, donors: list[Entries]) -> tuple[Values, list[Values], list[float]]:
        """The merged change τ_M, each donor's τᵢ and its λᵢ."""
        merged = self.change(weight, donors, [counted(trimmed, keep=keep) for keep in self.keeps(len(donors))])
        own = [_times(change, share) for change, share in zip(changes(weight, donors), self.weights_for(len(donors)), strict=True)]
        return merged, own, self.bounds(len(donors))

    def mask(self, weight: Entries, donors: list[Entries], number: int) -> tuple[Values, Values]:
        """The merged change τ_M, and where donor `number` needs it."""
        merged, own, least = self.parts(weight, donors)
        return merged, lambda at: needed(own[number](at), merged(at), least[number])


def _times(change: Values, share: float) -> Values:
    return lambda at: change(at).mul_(share)

"""Drop changes at random, small ones sooner: DELLA.

Deep et al. 2024, arXiv:2406.11617, section 3: MagPrune, elect, fuse. `keep` ± `spread` are probabilities, so they lie
between 0 and 1, unless all or nothing is kept.
Differs: ranks run within a row of a matrix, as in mergekit; `rescale: inverse` divides by `keep`, where the paper divides
each entry by its own probability; mergekit restores the sum of sizes (rescale: l1). A row of one entry keeps with
probability `keep`, where mergekit divides by zero.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from modelwright.core.settings import fraction
from modelwright.maths.slices import Entries, Sliced, Values
from modelwright.maths.task_vectors import by_rank, dropped
from modelwright.methods.merge._mechanism import RandomTaskVectors, Rescale


@dataclass(frozen=True, kw_only=True)
class Della(RandomTaskVectors):
    """Add to the model a random part of each donor's changes, larger ones more likely, where signs agree."""

    status: ClassVar[str] = "checked"
    neutral = dict(scale=0.0)
    searched: ClassVar[tuple[float, float]] = (0.2, 0.8)  # between which all of `keep` ± `spread` is a probability

    spread: float = fraction(0.15)  # the smallest of a row stays with probability keep - spread, the largest with keep + spread
    spread_each: tuple[float, ...] | None = None  # one for each donor, in the place of `spread`
    normalize: bool = True  # divide by the sum of the weights that count
    consensus: bool = True  # at each entry, only donors whose change has the elected sign count
    rescale: Rescale = "l1"  # of what stays: l1 (to the sum of sizes before), inverse (1/keep), none

    def problems(self) -> list[str]:
        found, given = super().problems(), (*(self.keep_each or ()), *(self.spread_each or ()))
        if not all(0 <= share <= 1 for share in given):
            return found  # they are no fractions, which is said of all such settings
        many = max(len(given), 1)
        for keep, spread in zip(self.keep_each or [self.keep] * many, self.spread_each or [self.spread] * many, strict=False):
            numbers = isinstance(keep, float) and isinstance(spread, float)  # and no maps by role or lists over depth
            if numbers and 0 < keep < 1 and not 0 < keep - spread <= keep + spread < 1:
                reach = f"{keep - spread:g} to {keep + spread:g}"
                found.append(f"keep {keep:g} and spread {spread:g} make probabilities from {reach}, not all between 0 and 1. Lower spread.")
        return found

    def tensor(self, weight: Entries, donors: list[Entries], rng: torch.Generator) -> Sliced:
        self.each(self.spread_each, "spread_each", len(donors))
        return super().tensor(weight, donors, rng)

    def drop(self, values: Values, shape: tuple[int, ...], keep: float, seed: int, donor: int) -> Values:
        spread = self.spread_each[donor] if self.spread_each else self.spread
        return dropped(values, by_rank(values, shape, keep, spread), seed)

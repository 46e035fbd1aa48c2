"""Trim each change, elect a sign, average what agrees.

Yadav, Tam, Choshen, Raffel, Bansal 2023, arXiv:2306.01708, algorithm 1.
`rescale: l1` brings what is left of a change to the sum of sizes that it had, as mergekit's `rescale: true`.
Differs: trims tensor by tensor, as mergekit does (the paper: scope: model); signs are elected on the weighted changes
(the paper: raw_votes: true), and what agrees is divided by the sum of its weights, as mergekit does (equal weights: the
paper). Where the changes cancel exactly, plus is elected, as in mergekit; the paper's code takes the sign of most entries.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from modelwright.maths.slices import Entries, Sliced
from modelwright.maths.task_vectors import least_of_changes, trimmed, without_below
from modelwright.methods.merge._mechanism import RescaledTaskVectors, counted, rescaling


@dataclass(frozen=True, kw_only=True)
class Ties(RescaledTaskVectors):
    """Add to the model the mean of those of the donors' largest changes that agree in sign."""

    status: ClassVar[str] = "checked"
    neutral = dict(scale=0.0)
    unsurveyed: ClassVar[frozenset[str]] = frozenset({"weights", "scale"})

    normalize: bool = True  # divide by the sum of the weights that agree
    consensus: bool = True  # at each entry, only donors whose change has the elected sign count

    scope: Literal["tensor", "model"] = "tensor"  # in which the largest changes are sought

    def problems(self) -> list[str]:
        return super().problems() + (self.everywhere("keep") if self.scope == "model" else [])

    def survey(self, weight: Entries, donors: list[Entries]) -> list[float] | None:
        """The size that a change of each donor must reach, when all tensors compete."""
        return least_of_changes(weight, donors, self.keeps(len(donors))) if self.scope == "model" else None

    def tensor(self, weight: Entries, donors: list[Entries], survey: list[float] | None) -> Sliced:
        keeps = self.keeps(len(donors))
        trims = [counted(without_below, least=least) for least in survey] if survey else [counted(trimmed, keep=keep) for keep in keeps]
        return self.added(weight, donors, [rescaling(trim, keep, self.rescale) for trim, keep in zip(trims, keeps, strict=True)])

"""Trim each change, elect a sign, average what agrees.

Yadav, Tam, Choshen, Raffel, Bansal 2023, arXiv:2306.01708, algorithm 1.
`rescale: l1` brings what is left of a change to the sum of sizes that it had, as mergekit's `rescale: true`; both sums run over
what competes, a tensor or the model.
Differs: trims tensor by tensor, as mergekit does (the paper: scope: model); signs are elected on the weighted changes
(the paper: raw_votes: true), and what agrees is divided by the sum of its weights, as mergekit does (equal weights: the
paper). Where the changes cancel exactly, plus is elected, as in mergekit; the paper's code takes the sign of most entries.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from modelwright.maths.slices import Entries, Sliced
from modelwright.maths.task_vectors import changes, least_of_changes, restoring, trimmed, without_below
from modelwright.methods.merge._mechanism import Rescale, RescaledTaskVectors, counted, rescaling


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

    def survey(self, weight: Entries, donors: list[Entries]) -> list[tuple[float, Rescale | float]] | None:
        """Of each donor, when all tensors compete: the size that a change must reach, and how what stays is made larger."""
        if self.scope == "tensor":
            return None
        count, least = math.prod(weight.shape), least_of_changes(weight, donors, self.keeps(len(donors)))
        if self.rescale != "l1":
            return [(one, self.rescale) for one in least]
        found = zip(changes(weight, donors), least, strict=True)
        return [(one, restoring(change, without_below(change, count, one), count)) for change, one in found]

    def tensor(self, weight: Entries, donors: list[Entries], survey: list[tuple[float, Rescale | float]] | None) -> Sliced:
        keeps = self.keeps(len(donors))
        if survey is None:
            return self.added(weight, donors, [rescaling(counted(trimmed, keep=keep), keep, self.rescale) for keep in keeps])
        found = zip(keeps, survey, strict=True)
        return self.added(weight, donors, [rescaling(counted(without_below, least=least), keep, how) for keep, (least, how) in found])

"""Trim each change, elect a sign, average what agrees.

Yadav, Tam, Choshen, Raffel, Bansal 2023, arXiv:2306.01708, algorithm 1.
Differs: trims tensor by tensor, not over the whole model, so that tensors stream from disk; signs are elected on the
weighted changes (the paper: raw_votes: true), and what agrees is divided by the sum of its weights, as mergekit does
(equal weights: the paper). Where the changes cancel exactly, plus is elected, as in mergekit; the paper's code takes
the sign of most entries.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from modelwright.maths.slices import Entries, Sliced
from modelwright.maths.task_vectors import trimmed
from modelwright.methods.merge._mechanism import SparseTaskVectors, counted


@dataclass(frozen=True, kw_only=True)
class Ties(SparseTaskVectors):
    """Add to the model the mean of those of the donors' largest changes that agree in sign."""

    status: ClassVar[str] = "checked"
    neutral = dict(scale=0.0)

    normalize: bool = True  # divide by the sum of the weights that agree
    consensus: bool = True  # at each entry, only donors whose change has the elected sign count

    def tensor(self, weight: Entries, donors: list[Entries]) -> Sliced:
        return self.added(weight, donors, [counted(trimmed, keep=keep) for keep in self.keeps(len(donors))])

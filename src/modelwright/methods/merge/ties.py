"""Trim each change, elect a sign, average what agrees.

Yadav, Tam, Choshen, Raffel, Bansal 2023, arXiv:2306.01708, algorithm 1.
Differs: trims tensor by tensor, not over the whole model, so that tensors stream from disk; signs are elected on the
weighted changes, and what agrees is divided by the sum of its weights, as mergekit does (equal weights: the paper).
Where the changes cancel exactly, plus is elected, as in mergekit; the paper's code takes the sign of most entries.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from modelwright.core.settings import fraction, number
from modelwright.maths import task_vectors
from modelwright.maths.slices import Entries, Sliced
from modelwright.methods.merge._mechanism import Merger


@dataclass(frozen=True, kw_only=True)
class Ties(Merger):
    """Add to the model the mean of those of the donors' largest changes that agree in sign."""

    status: ClassVar[str] = "checked"
    neutral = dict(scale=0.0)

    keep: float = fraction(0.2)  # of each donor's changes, largest first
    scale: float = number(1.0)  # of the merged change, λ in the paper
    normalize: bool = True  # divide by the sum of the weights that agree

    def merged(self, weight: Entries, donors: list[Entries]) -> Sliced:
        weights = self.weights_for(len(donors))
        return task_vectors.merge(weight, donors, weights, keep=self.keep, scale=self.scale, normalize=self.normalize)

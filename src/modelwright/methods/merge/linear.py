"""Average models, weight by weight.

Wortsman et al. 2022, arXiv:2203.05482, section 2 (uniform soup); weights as in mergekit's `linear`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from modelwright.maths import task_vectors
from modelwright.maths.slices import Entries, Sliced
from modelwright.methods.merge._mechanism import Merger


@dataclass(frozen=True, kw_only=True)
class Linear(Merger):
    """Replace every weight by the weighted mean of the donors'; the model itself counts only if it is a donor too."""

    status: ClassVar[str] = "checked"
    carries: ClassVar[bool] = True

    normalize: bool = True  # divide by the sum of the weights

    def problems(self) -> list[str]:
        if self.normalize and self.weights and task_vectors.cancel(self.weights):
            return ["the weights sum to 0, so there is no mean. Change one, or set normalize: false."]
        return []

    def tensor(self, weight: Entries, donors: list[Entries]) -> Sliced:
        return task_vectors.average(donors, self.weights_for(len(donors)), normalize=self.normalize, dtype=weight.dtype)

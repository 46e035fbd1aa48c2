"""Add weighted changes: learn with positive weights, forget with negative ones.

Ilharco et al. 2022, arXiv:2212.04089, section 2. Forgetting: `weights: [-1]`; an analogy θ_C + (θ_B - θ_A): the model C
with `base: A` donors B.
Differs: deltas are float32, whatever the models' dtype.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from modelwright.maths.slices import Entries, Sliced
from modelwright.methods.merge._mechanism import TaskVectors


@dataclass(frozen=True, kw_only=True)
class TaskArithmetic(TaskVectors):
    """Add to the model the weighted sum of what its donors learned."""

    status: ClassVar[str] = "checked"
    carries: ClassVar[bool] = True
    neutral = dict(scale=0.0)

    def tensor(self, weight: Entries, donors: list[Entries]) -> Sliced:
        return self.added(weight, donors, [])

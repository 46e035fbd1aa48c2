"""Add changes with a scale that rises from the first block to the last: LiNeS.

Wang et al. 2024, arXiv:2410.17146, section 4: block ℓ of L gets (α + β·ℓ/(L-1)) times the change, `start` α and `rise` β;
what lies outside the blocks gets α. Without `start`, α = (1/N)·‖Σ τᵢ‖₁/‖τ_merged‖₁ over the whole model, which is 1/N when
the changes are summed. With one donor, give it: start 0.1, rise 0.9 keeps what the model knew best. With `keep`, `consensus`
and `normalize` the merged change is that of TIES.
Differs: depth is counted over all of a model's blocks. `keep` trims over the whole model, as TIES was published.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Self

from modelwright.core.settings import fraction, number
from modelwright.maths import task_vectors
from modelwright.maths.slices import Entries, Sliced
from modelwright.maths.task_vectors import Sparsify, least_of_changes, size, without_below
from modelwright.methods.merge._mechanism import SparseTaskVectors, counted


class Found(NamedTuple):
    """Over all tensors: α, and the size that a change of each donor must reach."""

    start: float
    least: list[float]


@dataclass(frozen=True, kw_only=True)
class Lines(SparseTaskVectors):
    """Add what the donors learned, weakly to the first blocks, which hold what all tasks share, and fully to the last."""

    status: ClassVar[str] = "checked"
    neutral = dict(scale=0.0)

    start: float | None = number(None, low=0)  # of the first block and of what lies outside the blocks, α; by default 1/N, adjusted
    rise: float = number(0.5, low=0)  # what the last block's scale has more, β
    keep: float = fraction(1.0)  # of each donor's changes

    def problems(self) -> list[str]:
        return self.everywhere("keep")

    def at(self, role: str, depth: int | None, depths: int) -> Self | None:
        found = super().at(role, depth, depths)
        along = 0.0 if depth is None else depth / (depths - 1) if depths > 1 else 1.0
        return found and dataclasses.replace(found, rise=found.rise * along)

    def survey(self, weight: Entries, donors: list[Entries]) -> Found:
        count, least = weight.shape[0], least_of_changes(weight, donors, self.keeps(len(donors)))
        if self.start is not None:
            return Found(0.0, least)
        merged = size(self.change(weight, donors, _trimming(least)), count)
        summed = size(task_vectors.added(weight, donors, self.weights_for(len(donors)), consensus=False, normalize=False), count)
        return Found(summed / merged / len(donors) if merged else 0.0, least)

    def tensor(self, weight: Entries, donors: list[Entries], survey: Found) -> Sliced:
        scale = (survey.start if self.start is None else self.start) + self.rise
        return task_vectors.onto(weight, self.change(weight, donors, _trimming(survey.least)), self.scale * scale)


def _trimming(least: list[float]) -> list[Sparsify]:
    return [counted(without_below, least=one) for one in least] if any(least) else []

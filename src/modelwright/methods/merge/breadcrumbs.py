"""Leave out the largest and the smallest changes: model breadcrumbs.

Davari, Belilovsky 2023, arXiv:2312.06795, section 3. With `consensus: true` signs are elected as in TIES.
Differs: trims tensor by tensor, as mergekit does; where `top` of a small tensor is no whole entry, none of its largest
goes, where mergekit once lost its whole change (no longer in 0.1.5). `rescale: l1` is mergekit's `rescale: true`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from modelwright.core.settings import fraction
from modelwright.maths.slices import Entries, Sliced
from modelwright.maths.task_vectors import without_outliers
from modelwright.methods.merge._mechanism import RescaledTaskVectors, counted, rescaling


@dataclass(frozen=True, kw_only=True)
class Breadcrumbs(RescaledTaskVectors):
    """Add to the model the donors' changes of middle size."""

    status: ClassVar[str] = "checked"
    neutral = dict(scale=0.0)

    keep: float = fraction(0.9)  # of each donor's changes
    top: float = fraction(0.01)  # of the changes, the largest: left out
    top_each: tuple[float, ...] | None = None  # one for each donor, in the place of `top`

    def tensor(self, weight: Entries, donors: list[Entries]) -> Sliced:
        tops = self.each(self.top_each, "top_each", len(donors)) or [self.top] * len(donors)
        pairs = zip(self.keeps(len(donors)), tops, strict=True)
        cuts = [(counted(without_outliers, keep=keep, top=top), keep) for keep, top in pairs]
        return self.added(weight, donors, [rescaling(cut, keep, self.rescale) for cut, keep in cuts])

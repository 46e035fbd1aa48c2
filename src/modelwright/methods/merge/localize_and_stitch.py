"""Take over each donor's largest changes and stitch them together, without data.

He, Hu, Lin, Zhang, Zhao 2024, arXiv:2408.13656, section 4 (dataless): the mask of a donor covers the `keep` largest of
all its changes, of those that are not 0; where masks overlap, the donors' mean stands. `merge.learned_masks` trains the masks on text.
Differs: overlaps are counted over all donors, where the benchmark's code looks at the last pair alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from modelwright.core.method import Places
from modelwright.core.settings import fraction, number
from modelwright.maths.slices import Entries, Sliced
from modelwright.maths.stitching import reaching, stitched
from modelwright.maths.task_vectors import changes, least_of_changes
from modelwright.methods.merge._mechanism import Merger


@dataclass(frozen=True, kw_only=True)
class LocalizeAndStitch(Merger):
    """Put into the model the weights that each donor changed most; where several did, their mean."""

    status: ClassVar[str] = "checked"
    base_apart: ClassVar[bool] = True
    neutral = dict(scale=0.0)
    unsurveyed: ClassVar[frozenset[str]] = frozenset({"weights", "scale"})

    keep: float = fraction(0.1)  # of each donor's changes, over all the tensors that are chosen
    scale: float = number(1.0)  # of the stitched change
    skip: Places = "embed"  # roles to leave alone

    def survey(self, weight: Entries, donors: list[Entries]) -> list[float]:
        """The size that a change of each donor must reach."""
        return least_of_changes(weight, donors, [self.keep] * len(donors))

    def tensor(self, weight: Entries, donors: list[Entries], survey: list[float]) -> Sliced:
        masks = [reaching(change, least) for change, least in zip(changes(weight, donors), survey, strict=True)]
        return stitched(weight, donors, masks, self.weights_for(len(donors)), self.scale)

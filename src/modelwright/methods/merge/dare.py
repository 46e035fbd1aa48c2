"""Drop changes at random and make up for it: DARE.

Yu et al. 2023, arXiv:2311.03099, section 3. As published, what stays is divided by `keep` (rescale: inverse); mergekit
restores the sum of sizes (rescale: l1). With `consensus: true` it is DARE-TIES.
Differs: the mask of an entry depends on the seed, the tensor's name, the donor's number and the entry's place, so that
it does not change with the order of the work.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from modelwright.maths.slices import Values
from modelwright.maths.task_vectors import dropped
from modelwright.methods.merge._mechanism import RandomTaskVectors


@dataclass(frozen=True, kw_only=True)
class Dare(RandomTaskVectors):
    """Add to the model a random part of each donor's changes, divided by the part kept."""

    status: ClassVar[str] = "checked"
    neutral = dict(scale=0.0)

    def drop(self, values: Values, shape: tuple[int, ...], keep: float, seed: int, donor: int) -> Values:
        return dropped(values, keep, seed)

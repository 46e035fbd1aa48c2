"""Take tensors of one donor as they are, or times a number.

As mergekit's `passthrough`: with `where`, parts of a donor go into the model, and `scale` by role or depth changes only some:
`scale: {attn.o: 0, mlp.down: 0, "*": 1}` makes blocks that add nothing, as in Wu et al. 2024 (LLaMA Pro), arXiv:2401.02415,
section 3.2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from modelwright.core.settings import number
from modelwright.maths import task_vectors
from modelwright.maths.slices import Entries, Sliced
from modelwright.methods.merge._mechanism import PointWise


@dataclass(frozen=True, kw_only=True)
class Passthrough(PointWise):
    """Replace the chosen weights of the model by `scale` times the donor's."""

    status: ClassVar[str] = "checked"
    takes: ClassVar[tuple[int, int | None]] = (1, 1)

    scale: float = number(1.0)  # of the donor's weights

    def tensor(self, weight: Entries, donors: list[Entries]) -> Sliced:
        return task_vectors.average(donors, [self.scale], normalize=False, dtype=weight.dtype)

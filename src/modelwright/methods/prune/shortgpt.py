"""Remove the blocks that change their input least.

Men, Xu, Zhang, Wang, Lin, Lu, Han, Chen 2024, arXiv:2403.03853, section 3: block influence (`influence`), each block for itself.
Gromov, Tirumala, Shapourian, Glorioso, Roberts 2024, arXiv:2403.17887, section 3.2: the run of blocks over which the angle of
the last token turns least (`angle`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from modelwright.core.method import BlockMethod
from modelwright.core.settings import count


@dataclass(frozen=True, kw_only=True)
class ShortGpt(BlockMethod):
    """Remove whole `blocks`, those whose output is most like their input; the rest is untouched."""

    status: ClassVar[str] = "checked"
    neutral = dict(blocks=0)
    small = dict(blocks=1)

    blocks: int = count(1, low=0, unit="blocks")  # to remove
    measure: Literal["influence", "angle"] = "influence"  # of each block over all tokens, or of a run of so many over the last ones

    @property
    def span(self) -> int:
        return max(self.blocks, 1) if self.measure == "angle" else 1

    @property
    def last(self) -> bool:
        return self.measure == "angle"

    def block(self, before: Tensor, after: Tensor) -> Tensor:
        """1 - mean over tokens of the cosine of what enters and what leaves, both [tokens, width]; or the mean angle, in units of π."""
        cosine = cosine_similarity(before.double(), after.double(), dim=-1).clamp(-1, 1)
        return 1 - cosine.mean() if self.measure == "influence" else cosine.arccos().mean() / torch.pi

    def keep(self, scores: list[float]) -> list[int]:
        ranked = sorted(range(len(scores)), key=lambda depth: scores[depth])
        if self.measure == "influence":
            return sorted(ranked[self.blocks :])
        gone = range(ranked[0], ranked[0] + self.blocks)
        return [depth for depth in range(len(scores) + self.span - 1) if depth not in gone]

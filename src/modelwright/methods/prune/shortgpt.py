"""Remove the blocks that change their input least.

Men, Xu, Zhang, Wang, Lin, Lu, Han, Chen 2024, arXiv:2403.03853, section 3 (block influence).
Differs: the influence of every block is taken once, on the whole model, as in the paper's one-shot form; the contiguous
run of Gromov et al. 2024 (arXiv:2403.17887) is not offered.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

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

    def block(self, before: Tensor, after: Tensor) -> Tensor:
        """Block influence: 1 - mean over tokens of the cosine of what enters and what leaves, both [tokens, width]."""
        return 1 - cosine_similarity(before.float(), after.float(), dim=-1).mean()

    def keep(self, scores: list[float]) -> list[int]:
        ranked = sorted(range(len(scores)), key=lambda depth: scores[depth])
        return sorted(ranked[self.blocks :])

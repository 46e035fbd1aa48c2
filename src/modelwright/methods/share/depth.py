"""Let consecutive blocks use the same weights: recursion in depth.

Shen, Liu, Xing 2022, arXiv:2111.05297 (each block of a vision transformer applied twice). Liu et al. 2024, arXiv:2407.00928
(groups of a language model's blocks with the weights of one member, each with norms of its own).
Differs: for trained models, so that the shared weights begin as those of the first or last block of a group, or as the mean;
the untied projections, learnt residual scales and sliced attention of the first paper are left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from modelwright.core.model import Model

from ._mechanism import BlockSharer


@dataclass(frozen=True, kw_only=True)
class Depth(BlockSharer):
    """Store one block for every `loops` consecutive ones; each keeps its norms. Fewer bytes, the same FLOPs; train afterwards."""

    status: ClassVar[str] = "checked"
    neutral = dict(loops=1)
    small = dict(spare_last=0)

    def model(self, model: Model, notes: list[str]) -> Model:
        self.refuse_adapters(model.module)
        groups = self.share(model.module)
        shown = "; ".join(f"blocks {group[0]} to {group[-1]}" for group in groups)
        notes.append(f"{self.name()} shared the weights of {shown}" if groups else f"{self.name()} shared nothing")
        return model

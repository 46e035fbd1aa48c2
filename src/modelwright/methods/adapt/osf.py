"""Train each matrix within the directions that it uses least, so that what it knew stays.

Nayak, Killamsetty, Han, Bhandwaldar, Chanda, Xu, Wang, Pareja, Silkin, Eyceoz, Srivastava 2025, arXiv:2504.07097: W = U S Vᵀ; the
largest singular directions are frozen, the others train, and gradients into the frozen ones are taken out; through peft.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from modelwright.core.settings import count
from modelwright.methods.adapt._mechanism import StockAdapter


@dataclass(frozen=True, kw_only=True)
class Osf(StockAdapter):
    """For one task after another without forgetting; as many numbers as full tuning at `rank` 0."""

    status: ClassVar[str] = "checked"
    small = dict(rank=16)
    config = "OSFConfig"
    calls = dict(rank="effective_rank")
    patterns = dict(rank="rank_pattern")

    rank: int | None = count(None)  # frozen directions; by default half of them

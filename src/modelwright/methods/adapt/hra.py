"""Reflect each matrix's inputs at a few learned planes: Householder reflection adaptation.

Yuan, Liu, Xu 2024, arXiv:2405.17484: W' = W H₁ ... H_r with Hᵢ = I - 2 uᵢ uᵢᵀ / ‖uᵢ‖²; through peft. An even number of
reflections in equal pairs changes nothing at first.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from modelwright.core.settings import count
from modelwright.methods.adapt._mechanism import StockAdapter


@dataclass(frozen=True, kw_only=True)
class Hra(StockAdapter):
    """Both a low-rank update and a turn; few numbers, one vector for each reflection."""

    status: ClassVar[str] = "checked"
    sized_by: ClassVar[tuple[str, ...]] = ("rank",)
    config = "HRAConfig"
    calls = dict(rank="r", orthogonal="apply_GS")

    rank: int = count(8, low=2)  # reflections; an even number
    orthogonal: bool = False  # make the planes stand at right angles (Gram-Schmidt)

    def problems(self) -> list[str]:
        ranks = self.rank if isinstance(self.rank, tuple) else (self.rank,)
        odd = [rank for rank in ranks if isinstance(rank, int) and rank % 2]
        return [f"rank is {odd[0]}, and an odd number of reflections changes the model at once. Give an even one."] if odd else []

"""Train the scales of many random low-rank pairs that sum up to full rank.

Albert, Zhang, Saratchandran, Rodriguez-Opazo, van den Hengel, Abbasnejad 2025, arXiv:2502.00987: ΔW = s Σ Bᵢ Λᵢ A Γᵢ, with A and
B random and frozen; through peft.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from modelwright.core.settings import count, fraction, number
from modelwright.methods.adapt._mechanism import StockAdapter


@dataclass(frozen=True, kw_only=True)
class Randlora(StockAdapter):
    """Full-rank updates without training factors; `rank` lower means more numbers."""

    status: ClassVar[str] = "checked"
    sized_by: ClassVar[tuple[str, ...]] = ("rank",)
    neutral = {}  # Λ starts at zero: attaching changes no output
    small = dict(rank=8)
    config = "RandLoraConfig"
    calls = dict(rank="r", alpha="randlora_alpha", dropout="randlora_dropout")

    rank: int = count(32)  # of each pair; there are in / rank pairs
    alpha: float = number(640.0, low=0)  # the update is scaled by alpha / rank
    dropout: float = fraction(0.0, high=0.99)  # of the update's inputs, while training

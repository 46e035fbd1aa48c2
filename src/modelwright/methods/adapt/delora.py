"""Train low-rank updates whose length is bounded and learned apart from their direction.

Bini, Girrbach, Akata 2025, arXiv:2503.18225: ΔW = (λ ‖W‖ / rank) B Ξ A, with every pair of a column of B and a row of A at length
one; through peft.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from modelwright.core.settings import fraction, number
from modelwright.methods.adapt._mechanism import LowRank


@dataclass(frozen=True, kw_only=True)
class Delora(LowRank):
    """LoRA that cannot run away from the model at high learning rates."""

    status: ClassVar[str] = "checked"
    config = "DeloraConfig"
    calls = dict(rank="r", bound="delora_lambda", dropout="module_dropout")
    patterns = dict(rank="rank_pattern", bound="lambda_pattern")

    bound: float = number(15.0, low=0)  # λ, of the update's length, at first
    dropout: float = fraction(0.0, high=0.99)  # of whole updates, while training

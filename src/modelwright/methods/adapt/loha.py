"""Train the entry-by-entry product of two low-rank updates beside each matrix: LoHa.

Hyeon-Woo, Ye-Bin, Oh 2021, arXiv:2108.06098, section 2 (FedPara): ΔW = s (B₁ A₁) ⊙ (B₂ A₂), of a rank up to the square; Yeh et
al. 2023, arXiv:2309.14859; through peft.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from modelwright.methods.adapt._mechanism import OfTwoProducts


@dataclass(frozen=True, kw_only=True)
class Loha(OfTwoProducts):
    """Reaches high ranks with as many numbers as LoRA of twice the rank."""

    status: ClassVar[str] = "checked"
    config = "LoHaConfig"

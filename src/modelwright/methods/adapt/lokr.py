"""Train a Kronecker product of a small matrix and a low-rank one beside each matrix: LoKr.

Edalati, Tahaei, Kobyzev, Nia, Clark, Rezagholizadeh 2022, arXiv:2212.10650; Yeh et al. 2023, arXiv:2309.14859, section 3.2:
ΔW = s C ⊗ (B A); through peft.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from modelwright.core.settings import fraction, number
from modelwright.methods.adapt._mechanism import LowRank


@dataclass(frozen=True, kw_only=True)
class Lokr(LowRank):
    """Fewer numbers than LoRA for the same rank of the update."""

    status: ClassVar[str] = "checked"
    neutral = {}  # a factor starts at zero: attaching changes no output
    config = "LoKrConfig"
    calls = dict(rank="r", dropout="rank_dropout")
    patterns = dict(rank="rank_pattern", alpha="alpha_pattern")

    alpha: float = number(16.0, low=0)  # the update is scaled by alpha / rank
    dropout: float = fraction(0.0, high=0.99)  # of whole ranks, while training

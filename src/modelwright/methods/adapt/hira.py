"""Train a low-rank matrix by which the weights are multiplied, entry by entry: Hadamard high-rank adaptation.

Huang, Ko, Zhuang, Tang, Zhang 2025, ICLR: ΔW = W ⊙ (B A), whose rank is not bounded by that of B A; through peft.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from modelwright.core.settings import fraction
from modelwright.methods.adapt._mechanism import LowRank


@dataclass(frozen=True, kw_only=True)
class Hira(LowRank):
    """An update of high rank for LoRA's numbers, where the model already has the directions."""

    status: ClassVar[str] = "checked"
    neutral = {}  # B starts at zero: attaching changes no output
    config = "HiraConfig"
    calls = dict(rank="r", dropout="hira_dropout")
    patterns = dict(rank="rank_pattern")

    dropout: float = fraction(0.0, high=0.99)  # of the update's inputs, while training

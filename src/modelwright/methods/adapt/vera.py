"""Train only the scales of one random low-rank pair that all matrices share.

Kopiczko, Blankevoort, Asano 2023, arXiv:2310.11454, section 3.1: ΔW x = Λ_b B Λ_d A x, with A and B random, frozen and cut from
one pair for all layers; through peft.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from modelwright.core.settings import count, fraction, number
from modelwright.methods.adapt._mechanism import StockAdapter


@dataclass(frozen=True, kw_only=True)
class Vera(StockAdapter):
    """A tenth of LoRA's trained numbers at a high rank: two vectors for each matrix."""

    status: ClassVar[str] = "checked"
    sized_by: ClassVar[tuple[str, ...]] = ("rank",)
    neutral = {}  # Λ_b starts at zero: attaching changes no output
    small = dict(rank=8)
    config = "VeraConfig"
    calls = dict(rank="r", initial="d_initial", dropout="vera_dropout")

    rank: int = count(256)  # of the shared pair
    initial: float = number(0.1)  # of the scales Λ_d at first
    dropout: float = fraction(0.0, high=0.99)  # of the update's inputs, while training

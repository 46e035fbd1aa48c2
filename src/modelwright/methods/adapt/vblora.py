"""Train one bank of vectors from which all layers' low-rank factors are put together.

Li, Han, Ji 2024, arXiv:2405.15179: each piece of A and B is a weighted sum of the `top` vectors of a shared bank that its logits
choose; through peft.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from modelwright.core.settings import count, fraction
from modelwright.methods.adapt._mechanism import StockAdapter, undivided


@dataclass(frozen=True, kw_only=True)
class Vblora(StockAdapter):
    """The smallest files of adapters: few vectors for the whole model."""

    status: ClassVar[str] = "checked"
    sized_by: ClassVar[tuple[str, ...]] = ("vectors",)
    small = dict(vectors=16, length=8)
    config = "VBLoRAConfig"
    calls = dict(rank="r", vectors="num_vectors", length="vector_length", top="topk", dropout="vblora_dropout")

    rank: int = count(4)  # of the updates
    vectors: int = count(256)  # in the bank
    length: int = count(256)  # of a vector; it must divide all matrices' inputs and outputs
    top: int = count(2)  # vectors in each sum
    dropout: float = fraction(0.0, high=0.99)  # of the update's inputs, while training

    def unfit(self, shape: tuple[int, ...]) -> str:
        return undivided(shape[0], self.length, "length") or undivided(shape[1], self.length, "length")

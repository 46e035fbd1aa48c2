"""Train a low-rank update for each block of a matrix that is cut into a grid.

Jung, Ahn, Kim, Kim, Park 2025, arXiv:2505.20355: k × k blocks, each with factors of rank / k, so that the numbers are LoRA's and
the update's rank is k times as high; through peft.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from modelwright.core.settings import count, fraction, number
from modelwright.methods.adapt._mechanism import LowRank, undivided


@dataclass(frozen=True, kw_only=True)
class Gralora(LowRank):
    """LoRA for high ranks, where one pair of factors for the whole matrix learns unevenly."""

    status: ClassVar[str] = "checked"
    neutral = {}  # B starts at zero: attaching changes no output
    config = "GraloraConfig"
    calls = dict(rank="r", grid="gralora_k", dropout="gralora_dropout")

    alpha: float = number(16.0, low=0)  # the update is scaled by alpha / rank
    grid: int = count(2)  # blocks along each side, k; it must divide the rank, the inputs and the outputs
    dropout: float = fraction(0.0, high=0.99)  # of the update's inputs, while training

    def unfit(self, shape: tuple[int, ...]) -> str:
        numbers = (shape[0], shape[1], self.rank)
        return super().unfit(shape) or next(filter(None, (undivided(number, self.grid, "grid") for number in numbers)), "")

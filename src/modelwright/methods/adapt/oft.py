"""Turn each matrix's inputs in small blocks, by angles that are learned: orthogonal fine-tuning.

Qiu, Liu, Feng, Xue, Feng, Liu, Zhang, Weller, Schölkopf 2023, arXiv:2306.07280: W' = W R with R block-diagonal and
orthogonal, by Cayley's formula; through peft.
Differs: Cayley's inverse is a sum of few terms, as in peft's default.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from modelwright.core.settings import count, fraction
from modelwright.methods.adapt._mechanism import StockAdapter, undivided


@dataclass(frozen=True, kw_only=True)
class Oft(StockAdapter):
    """Keeps the angles between neurons, and so what the model knew; for images and style."""

    status: ClassVar[str] = "checked"
    sized_by: ClassVar[tuple[str, ...]] = ("group",)
    small = dict(group=8)
    config = "OFTConfig"
    calls = dict(group="oft_block_size", dropout="module_dropout")
    fixed = dict(r=0)

    group: int = count(32, low=2)  # inputs turned together; it must divide the matrix's
    dropout: float = fraction(0.0, high=0.99)  # of blocks, while training

    def unfit(self, shape: tuple[int, ...]) -> str:
        return undivided(shape[1], self.group, "group")

"""Train one vector that is spread over all layers' low-rank factors by a fixed random map.

arXiv:2506.00799: every entry of A and B is an entry of one vector of `size` numbers, over the root of how often it is used;
through peft.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from modelwright.core.settings import count, fraction
from modelwright.methods.adapt._mechanism import StockAdapter


@dataclass(frozen=True, kw_only=True)
class Unilora(StockAdapter):
    """All of LoRA's numbers from a few hundred; for tiny adapters."""

    status: ClassVar[str] = "checked"
    sized_by: ClassVar[tuple[str, ...]] = ("size",)
    config = "UniLoraConfig"
    calls = dict(rank="r", size="theta_d_length", dropout="unilora_dropout")

    rank: int = count(4)  # of the updates
    size: int = count(256)  # numbers of the vector, for all layers
    dropout: float = fraction(0.0, high=0.99)  # of the update's inputs, while training

"""Train the scales of one random low-rank pair as distributions: probabilistic VeRA.

arXiv:2512.07703: as VeRA, but the inner numbers of the pair are drawn from a normal distribution whose mean and spread are
learned, and are its mean after training; through peft.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from modelwright.core.settings import count, fraction, number
from modelwright.methods.adapt._mechanism import StockAdapter


@dataclass(frozen=True, kw_only=True)
class Pvera(StockAdapter):
    """VeRA with noise that is learned, against fitting few examples too closely."""

    status: ClassVar[str] = "checked"
    sized_by: ClassVar[tuple[str, ...]] = ("rank",)
    neutral = {}  # the outer scales start at zero: attaching changes no output
    small = dict(rank=8)
    config = "PveraConfig"
    calls = dict(rank="r", initial="d_initial", dropout="pvera_dropout")

    rank: int = count(256)  # of the shared pair
    initial: float = number(0.1)  # of the scales at first
    dropout: float = fraction(0.0, high=0.99)  # of the update's inputs, while training

"""Train a small network that reads a matrix and gives its update: PEANuT.

arXiv:2410.01870: ΔW = U φ(... φ(W D)), a function of the weight and not a matrix of its own; through peft.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from modelwright.core.settings import count, number
from modelwright.methods.adapt._mechanism import LowRank


@dataclass(frozen=True, kw_only=True)
class Peanut(LowRank):
    """An update that depends on what the weight is, with LoRA's numbers."""

    status: ClassVar[str] = "checked"
    neutral = {}  # U starts at zero: attaching changes no output
    config = "PeanutConfig"
    calls = dict(rank="r", layers="depth", activation="act_fn", scale="scaling")

    layers: int = count(0, low=0, high=8)  # layers between the first and the last
    activation: Literal["relu", "gelu", "silu", "tanh"] = "relu"  # φ
    scale: float = number(1.0)  # of the update

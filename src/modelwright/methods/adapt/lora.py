"""Train a low-rank update beside each frozen matrix.

Hu, Shen, Wallis, Allen-Zhu, Li, Wang, Wang, Chen 2021, arXiv:2106.09685, section 4.1; through peft. With `stable` the update is
scaled by alpha / √rank: Kalajdzievski 2023, arXiv:2312.03732 (rsLoRA).
Differs: A begins uniform within ±1/√in, as in the authors' code, where the paper says normal.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from modelwright.core.settings import fraction, number
from modelwright.methods.adapt._mechanism import LowRank


@dataclass(frozen=True, kw_only=True)
class Lora(LowRank):
    """Add `alpha/rank · B A x` to the output of each chosen matrix; only A and B train."""

    status: ClassVar[str] = "checked"
    checked_on: ClassVar[tuple[str, ...]] = ()
    neutral = {}  # B starts at zero: attaching changes no output
    config = "LoraConfig"
    calls = dict(rank="r", alpha="lora_alpha", dropout="lora_dropout", stable="use_rslora")
    patterns = dict(rank="rank_pattern", alpha="alpha_pattern")
    suffices: ClassVar[frozenset[str]] = frozenset({"packed"})  # QLoRA: gradients pass packed weights, which stay as they are
    sites: ClassVar[tuple[str, ...]] = ("attn", "mlp", "linear", "conv")

    alpha: float = number(16.0, low=0)  # the update is scaled by alpha / rank
    dropout: float = fraction(0.0, high=0.99)  # of the update's inputs, while training
    stable: bool = False  # scale by alpha / √rank, so that high ranks learn as fast as low ones

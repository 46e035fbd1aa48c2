"""Train a low-rank update beside each frozen matrix.

Hu, Shen, Wallis, Allen-Zhu, Li, Wang, Wang, Chen 2021, arXiv:2106.09685, section 4.1; through peft. With `stabilised` the update is
scaled by alpha / √rank: Kalajdzievski 2023, arXiv:2312.03732 (rsLoRA).
Differs: A begins uniform within ±1/√in, as in the authors' code, where the paper says normal.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from modelwright.methods.adapt._mechanism import Lowered


@dataclass(frozen=True, kw_only=True)
class Lora(Lowered):
    """Add `alpha/rank · B A x` to the output of each chosen matrix; only A and B train."""

    status: ClassVar[str] = "checked"
    checked_on: ClassVar[tuple[str, ...]] = ()
    neutral = {}  # B starts at zero: attaching changes no output
    suffices: ClassVar[frozenset[str]] = frozenset({"packed"})  # QLoRA: gradients pass packed weights, which stay as they are
    sites: ClassVar[tuple[str, ...]] = ("attn", "mlp", "linear", "conv")

    stabilised: bool = False  # scale by alpha / √rank, so that high ranks learn as fast as low ones

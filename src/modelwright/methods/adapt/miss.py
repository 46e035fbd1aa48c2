"""Train one block for each matrix that its inputs, cut in pieces and added up, pass through: MiSS, and Bone.

Kang, Yin 2024, arXiv:2409.15371. `balanced`: y += S D with S the sum of x's pieces of `rank` numbers and D [rank, out]; it
equals LoRA with a fixed A of zeros and ones. `bat` (block affine): ΔW = W T + T in blocks of rank × rank. `mini`: D's first
`narrow` columns, repeated. Through peft.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from modelwright.core.settings import count, fraction
from modelwright.methods.adapt._mechanism import StockAdapter


@dataclass(frozen=True, kw_only=True)
class Miss(StockAdapter):
    """As cheap as LoRA with one matrix in place of two; `bat` lets the update depend on the weight."""

    status: ClassVar[str] = "checked"
    sized_by: ClassVar[tuple[str, ...]] = ("rank",)
    neutral = {}  # the block starts at zero: attaching changes no output
    small = dict(rank=8)
    config = "MissConfig"
    apart = ("variant",)
    calls = dict(rank="r", narrow="mini_r", dropout="miss_dropout")

    rank: int = count(64)  # rows of the block; for `bat`, its side, which must divide the matrix's
    variant: Literal["balanced", "bat", "mini"] = "balanced"  # what the block is
    narrow: int = count(1)  # columns of the block of `mini`, which must divide the matrix's outputs
    dropout: float = fraction(0.0, high=0.99)  # of the update's inputs, while training

    def told(self, roles: Mapping[str, str]) -> dict[str, Any]:
        return {"init_weights": True if self.variant == "balanced" else self.variant}

    def unfit(self, shape: tuple[int, ...]) -> str:
        rows, columns = shape[:2]
        if self.variant == "bat" and (rows % self.rank or columns % self.rank):
            return f"is {rows} × {columns}, which blocks of {self.rank} do not divide. Give a rank that divides both"
        if self.variant == "mini" and rows % self.narrow:
            return f"has {rows} outputs, which {self.narrow} columns do not divide. Give a `narrow` that does"
        return ""

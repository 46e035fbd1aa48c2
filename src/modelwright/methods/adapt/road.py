"""Turn each matrix's outputs in pairs, by an angle and a length that are learned.

Liao, Monz 2024, arXiv:2409.00119: y' = R y with R of 2 × 2 turns; `variant` 1, 2 or 4 numbers for each two outputs; through peft.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from modelwright.core.settings import count
from modelwright.methods.adapt._mechanism import StockAdapter, undivided


@dataclass(frozen=True, kw_only=True)
class Road(StockAdapter):
    """Adapters that can be mixed in one batch, one number for each output."""

    status: ClassVar[str] = "checked"
    neutral = {}  # all angles start at zero
    small = dict(group=8)
    config = "RoadConfig"
    calls = dict(group="group_size")

    variant: Literal["road_1", "road_2", "road_4"] = "road_1"  # how many numbers a pair has
    group: int = count(64, low=2)  # outputs whose halves are paired; it must divide the matrix's

    def unfit(self, shape: tuple[int, ...]) -> str:
        return undivided(shape[0], self.group, "group")

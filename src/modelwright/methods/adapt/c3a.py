"""Train circulant blocks beside each matrix, which multiply as fast as Fourier transforms.

Chen, Cheng, Chen, Zhang, Wang, Jin, Zheng 2024, arXiv:2407.19342: ΔW of blocks that are each one row, turned by one place from row to
row; through peft.
Differs: the blocks begin at zero, where peft has random ones, which change the model at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from modelwright.core.settings import count
from modelwright.methods.adapt._mechanism import StockAdapter, undivided


@dataclass(frozen=True, kw_only=True)
class C3a(StockAdapter):
    """Full rank for few numbers, out · in / block of them."""

    status: ClassVar[str] = "checked"
    sized_by: ClassVar[tuple[str, ...]] = ("group",)
    neutral = {}  # the blocks start at zero
    small = dict(group=8)
    config = "C3AConfig"
    calls = dict(group="block_size")
    patterns = dict(group="block_size_pattern")
    fixed = dict(init_weights=True)

    group: int = count(64)  # side of a block; it must divide the matrix's inputs and outputs

    def unfit(self, shape: tuple[int, ...]) -> str:
        return undivided(shape[0], self.group, "group") or undivided(shape[1], self.group, "group")

"""Turn each matrix's outputs by a product of sparse turns, as a fast Fourier transform is made.

Liu, Qiu, Feng, Xiu, Xue, Yu, Feng, Liu, Heo, Peng, Wen, Black, Weller, Schölkopf 2023, arXiv:2311.06243: butterfly orthogonal
fine-tuning; through peft.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from modelwright.core.settings import count, fraction
from modelwright.methods.adapt._mechanism import StockAdapter, undivided


@dataclass(frozen=True, kw_only=True)
class Boft(StockAdapter):
    """Denser turns than `adapt.oft` for as many numbers; slower."""

    status: ClassVar[str] = "checked"
    sized_by: ClassVar[tuple[str, ...]] = ("group",)
    small = dict(group=4)
    config = "BOFTConfig"
    calls = dict(group="boft_block_size", factors="boft_n_butterfly_factor", dropout="boft_dropout")
    fixed = dict(boft_block_num=0)

    group: int = count(4, low=2)  # turned together; it must divide the matrix's inputs
    factors: int = count(1)  # sparse turns in the product
    dropout: float = fraction(0.0, high=0.99)  # of blocks, while training

    def unfit(self, shape: tuple[int, ...]) -> str:
        return undivided(shape[1], self.group, "group")

"""Round every weight to the nearest point of its group's integer grid.

Folklore; the grid is that of compressed-tensors: symmetric scale max|w| / ((2^bits - 1) / 2), halves to even.
Differs: a group that does not divide a row is lowered to the largest divisor that they share, or raised to
the whole row where that is below 16.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from modelwright.core.method import TensorMethod
from modelwright.methods.quantize._mechanism import Quantizer


@dataclass(frozen=True, kw_only=True)
class Rtn(Quantizer, TensorMethod):
    """Store weights in a few bits, as integers or on another grid, each rounded by itself; needs no text."""

    status: ClassVar[str] = "checked"
    small = dict(group=32)

    def tensor(self, weight: Tensor) -> nn.Module:
        grid = self.fitted(weight)
        return self.stored(grid, grid.encode(weight), weight)

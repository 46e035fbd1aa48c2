"""Store weights as 8-bit floats with a scale for each row, each tile or the matrix: FP8.

Micikevicius et al. 2022, arXiv:2209.05433, the format E4M3 (largest 448, no infinity); scale max|w| / 448, of 128 by 128 tiles as
DeepSeek-V3 (arXiv:2412.19437, section 3.3.2) has them.
Differs: weights only; inputs stay as they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor, nn

from modelwright.blocks.float8 import Float8Linear
from modelwright.core.method import TensorMethod
from modelwright.maths.grids import TILE, float8
from modelwright.methods.quantize._mechanism import Packer


@dataclass(frozen=True, kw_only=True)
class Fp8(Packer, TensorMethod):
    """Store weights as 8-bit floats; half of 16 bits, with errors in proportion to each weight's size."""

    status: ClassVar[str] = "checked"

    scope: Literal["row", "tensor", "tile"] = "row"  # what shares a scale: a row, the matrix, or 128 rows by 128 columns

    def unfit(self, shape: tuple[int, ...]) -> str:
        if self.scope == "tile" and len(shape) == 2 and shape[1] % TILE:
            return f"has {shape[1]} inputs, no multiple of {TILE}, as tiles ask for"
        return super().unfit(shape)

    def tensor(self, weight: Tensor) -> nn.Module:
        grid = float8(weight, self.scope)
        return Float8Linear.from_codes(grid.encode(weight), grid, self.scope)

    def planned(self, weight: Tensor) -> nn.Module:
        return Float8Linear(*weight.shape, scope=self.scope, dtype=weight.dtype, device="meta")

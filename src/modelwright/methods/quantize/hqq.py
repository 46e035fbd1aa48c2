"""Move each group's zero point to where the weights lose least, large errors counting little: HQQ.

Badri, Shaji 2023, "Half-Quadratic Quantization of Large Machine Learning Models", equations 2 to 5: min over z of Σ|w - ŵ|^p, p < 1, by
turns of a shrinkage of the errors and a mean for z; scales stay those of the groups' ranges. Zero points are floats.
Differs: each group keeps the best zero point that it has seen; the published code may stop one step after it. Groups lie in rows.
Zero points have the weights' dtype, as there: in bfloat16 a group far from 0 for its range loses digits that whole zero points keep.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from modelwright.blocks.packed import PackedLinear
from modelwright.core.method import TensorMethod
from modelwright.core.settings import count, fraction, number
from modelwright.maths.grids import Affine
from modelwright.maths.rounding import half_quadratic
from modelwright.methods.quantize._mechanism import Grouped


@dataclass(frozen=True, kw_only=True)
class Hqq(Grouped, TensorMethod):
    """Store weights as integers with zero points that are fitted to the bulk of each group; needs no text."""

    status: ClassVar[str] = "checked"
    drops: ClassVar[frozenset[str]] = Grouped.drops | {"sparse"}  # zero points between whole numbers have no 0
    small = dict(group=32)

    bits: int = count(4, 2, 8, "bits")  # per weight
    group: int = count(64, low=0, unit="weights")  # of a row that share a scale; 0 for the whole row
    power: float = fraction(0.7, low=0.05)  # of the errors that are made small
    strength: float = number(10.0, low=1e-3)  # how closely the shrunk errors must be met, at first
    growth: float = number(1.01, low=1)  # what that is multiplied by after each step
    iterations: int = count(20)  # the most steps

    def tensor(self, weight: Tensor) -> nn.Module:
        scale, zero = half_quadratic(
            weight, self.bits, self.group_of(weight.shape[1]), power=self.power, strength=self.strength, growth=self.growth,
            iterations=self.iterations,
        )  # fmt: skip
        return PackedLinear.from_codes(Affine(scale, zero, self.bits).encode(weight), scale, zero, self.bits)

    def planned(self, weight: Tensor) -> nn.Module:
        return PackedLinear(*weight.shape, bits=self.bits, group=self.group_of(weight.shape[1]), symmetric=False, zeros="float",
                            dtype=weight.dtype, device="meta")  # fmt: skip

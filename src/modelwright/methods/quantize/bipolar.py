"""Store weights as odd whole numbers in planes of signs: the first planes of the file are the model in fewer bits.

Ma, Fang et al. 2024, arXiv:2409.17870, section 3 (bipolar-INT): n bits stand for the odd numbers up to 2^n - 1, scale = max|w| /
(2^n - 1); one bit is the sign, with the mean size as its scale.
Differs: the paper's kernels for accelerators are not here; weights are made dense to compute, and `maths.bit_planes.product` says
what the kernels compute. A weight in the middle of two numbers takes the one whose place among the sizes is even.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from modelwright.blocks.planes import PlanesLinear
from modelwright.core.method import TensorMethod
from modelwright.core.settings import count
from modelwright.maths import grids
from modelwright.methods.quantize._mechanism import Grouped


@dataclass(frozen=True, kw_only=True)
class Bipolar(Grouped, TensorMethod):
    """Store weights in planes of one bit, of which any number of first ones is a model too; no weight stays 0."""

    status: ClassVar[str] = "checked"
    drops: ClassVar[frozenset[str]] = Grouped.drops | {"sparse"}  # no odd number is 0
    small = dict(group=32)

    bits: int = count(4, 1, 8, "bits")  # per weight

    def tensor(self, weight: Tensor) -> nn.Module:
        group = self.group_of(weight.shape[1])
        grid = grids.scaled(weight, "odd", group, "own", rule="mean" if self.bits == 1 else "largest", bits=self.bits)
        return PlanesLinear.from_codes(grid.encode(weight), grid.stored["weight_scale"], self.bits)

    def planned(self, weight: Tensor) -> nn.Module:
        return PlanesLinear(*weight.shape, bits=self.bits, group=self.group_of(weight.shape[1]), dtype=weight.dtype, device="meta")

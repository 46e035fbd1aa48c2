"""Integer quantisation: a grid of scales by group, codes chosen by a solver, packed storage.

A method fills in the solver: `quantize.rtn` takes the nearest code, `quantize.gptq` passes each column's error on to
the columns that are still to come.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from modelwright.blocks.packed import PackedLinear
from modelwright.core.method import SiteMethod
from modelwright.core.settings import count

SMALLEST_GROUP = 16  # a scale for fewer weights costs more than it saves


@dataclass(frozen=True, kw_only=True)
class IntegerQuantizer(SiteMethod):
    """Stores each chosen weight as packed integers with a scale per group."""

    sites: ClassVar[tuple[str, ...]] = ("attn", "mlp", "experts", "linear")
    leaves: ClassVar[frozenset[str]] = frozenset({"packed"})
    drops: ClassVar[frozenset[str]] = frozenset({"float"})

    bits: int = count(4, 2, 8, "bits")  # per weight
    group: int = count(128, low=0, unit="weights")  # of a row that share a scale; 0 for the whole row
    symmetric: bool = True  # false adds zero points, and then modelwright is needed to load
    search: bool = False  # shrink each group's range to the one with the least error, as GPTQ's authors offer

    def group_of(self, columns: int) -> int | None:
        """The group for rows of this many inputs: the largest divisor they share, or None, the whole row, where that is small."""
        group = math.gcd(self.group, columns) if self.group else columns
        return None if group == columns or group < min(self.group, SMALLEST_GROUP) else group

    def unfit(self, shape: tuple[int, ...]) -> str:
        return "" if len(shape) == 2 else f"has the shape {list(shape)}, and packed integers are for matrices"

    def packed(self, codes: Tensor, scale: Tensor, zero: Tensor | None) -> nn.Module:
        """The layer that stores the codes [out, in]."""
        return PackedLinear.from_codes(codes, scale, zero, bits=self.bits)

    def planned(self, weight: Tensor) -> nn.Module:
        return PackedLinear(out_features=weight.shape[0], in_features=weight.shape[1], bits=self.bits, group=self.group_of(weight.shape[1]),
                            symmetric=self.symmetric, dtype=weight.dtype, device="meta")  # fmt: skip

    def promise(self) -> dict[str, Any]:
        return {"bits": self.bits} if isinstance(self.bits, int) else {}

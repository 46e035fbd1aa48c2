"""Keep two of every four weights of a core, between two block-diagonal matrices that make up for the others.

Liu et al. 2025, ARMOR, arXiv:2510.05528: W ≈ A C B. A step is one of Adam on A, B and the nonzeros of C, then an exact choice of
one run of four in every pair of blocks. Rows and columns are normalised first, and errors weighted by the inputs' mean squares.
Differs: the best state of all steps is kept. Weights by which the normalisation would count again (rᵢ² cⱼ²) are not offered.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from modelwright.blocks.armor import ArmorLinear
from modelwright.core.errors import SiteError
from modelwright.core.method import LayerMethod
from modelwright.core.settings import count, number
from modelwright.core.statistics import Statistics
from modelwright.core.weights import not_finite
from modelwright.maths.wrapped import wrapped


@dataclass(frozen=True, kw_only=True)
class Armor(LayerMethod):
    """Replace matrices by a 2:4 core between two block-diagonal ones: more bytes than 2:4 alone, and closer."""

    status: ClassVar[str] = "checked"
    sites: ClassVar[tuple[str, ...]] = ("attn", "mlp", "experts", "linear")
    leaves: ClassVar[frozenset[str]] = frozenset({"sparse"})
    gathers: ClassVar[tuple[str, ...]] = ("square",)
    holds: ClassVar[float] = 16
    small = dict(width=8, iterations=3)

    width: int = count(128, low=4)  # of the blocks of the outer matrices; 4 divides it, and it divides both sides of a matrix
    iterations: int = count(20_000, low=0)  # at most; it ends sooner once nothing is gained
    rate: float = number(1e-4, low=0)  # of Adam
    store: Literal["armor", "dense"] = "armor"  # dense: multiply the three out, which saves nothing and loads anywhere

    def layer(self, weight: Tensor, statistics: Statistics, rng: torch.Generator) -> Tensor | nn.Module:
        if not_finite(weight):
            raise SiteError(f"{self.name()}: a weight holds NaN or infinity. Start from sound weights, or leave it out with `skip`.")
        parts = wrapped(weight.float(), statistics.square, self.width, rng, steps=self.iterations, rate=self.rate)
        layer = ArmorLinear.from_parts(*(part.to(weight.dtype) for part in parts))
        return layer if self.store == "armor" else layer.dense()

    def unfit(self, shape: tuple[int, ...]) -> str:
        if len(shape) != 2:
            return f"has the shape {list(shape)}, and the three parts are for matrices"
        if self.width % 4 or shape[0] % self.width or shape[1] % self.width:
            return f"is {shape[0]} × {shape[1]}; the width must be a multiple of 4 that divides both, and is {self.width}"
        return ""

    def planned(self, weight: Tensor) -> Tensor | nn.Module:
        if self.store == "dense":
            return weight
        rows, columns = weight.shape
        return ArmorLinear(rows, columns, size=self.width, nonzeros=rows * columns // 2, dtype=weight.dtype, device="meta")

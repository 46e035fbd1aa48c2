"""Zero the weights with the least |weight| × input norm.

Sun, Liu, Bair, Kolter 2023, arXiv:2306.11695, section 3.
Differs: experts that saw no token are ranked by size alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from modelwright.core.statistics import Statistics
from modelwright.methods.prune._mechanism import LayerPruner


@dataclass(frozen=True, kw_only=True)
class Wanda(LayerPruner):
    """Zero `sparsity` of each row by weight size times input norm; no weight update."""

    status: ClassVar[str] = "checked"
    gathers: ClassVar[tuple[str, ...]] = ("norm",)
    neutral = dict(sparsity=0.0)

    def competing(self) -> Literal["tensor", "row"]:
        return "row"

    def score(self, weight: Tensor, statistics: Statistics) -> Tensor:
        return weight.abs() * statistics.norm

"""Weight pruning: score the weights, remove the lowest, let the rest make up for it, store what is left.

A method fills in a score (`prune.magnitude`, `prune.wanda`) or does removal and compensation together
(`prune.sparsegpt`). How many are removed, in which competition, and how zeros are stored is written here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from modelwright.blocks.sparse import SparseLinear
from modelwright.core.method import LayerMethod, SiteMethod, TensorMethod
from modelwright.core.settings import Pattern, fraction
from modelwright.core.statistics import Statistics
from modelwright.maths.masks import lowest


@dataclass(frozen=True, kw_only=True)
class Pruner(SiteMethod):
    """Zeroes a share of each chosen weight."""

    leaves: ClassVar[frozenset[str]] = frozenset({"sparse"})
    compete: ClassVar[Literal["tensor", "row"]] = "tensor"  # weights are ranked within this

    sparsity: float = fraction(0.5)  # of the weights that become zero, 0 to 1
    pattern: Pattern | None = None  # "2:4" keeps two of every four inputs, and overrides sparsity
    store: Literal["dense", "sparse"] = "dense"  # sparse: a bit per weight and the nonzeros; needs modelwright to load

    def removed(self, score: Tensor) -> Tensor:
        """The mask of the weights to remove, by their score [out, in]."""
        pattern = (self.pattern.keep, self.pattern.of) if self.pattern else None
        return lowest(score, self.sparsity, per=self.compete, pattern=pattern)

    def stored(self, weight: Tensor) -> Tensor | nn.Module:
        """The pruned weight in the form that the settings ask for."""
        return weight if self.store == "dense" else SparseLinear.from_dense(weight)

    def zeros(self, rows: int, columns: int) -> int:
        """How many weights of a matrix of this size are removed."""
        if self.pattern:
            return rows * columns // self.pattern.of * (self.pattern.of - self.pattern.keep)
        return rows * int(self.sparsity * columns) if self.compete == "row" else int(self.sparsity * rows * columns)

    def unfit(self, shape: tuple[int, ...]) -> str:
        columns = math.prod(shape[1:])
        if self.pattern and columns % self.pattern.of:
            return f"has {columns} inputs, which the pattern {self.pattern} does not divide"
        if self.store == "sparse" and len(shape) != 2:
            return f"has the shape {list(shape)}, and the sparse form is for matrices; use store: dense"
        return ""

    def planned(self, weight: Tensor) -> Tensor | nn.Module:
        if self.store == "dense":
            return weight
        rows, columns = weight.shape
        return SparseLinear(out_features=rows, in_features=columns, nonzeros=rows * columns - self.zeros(rows, columns),
                            dtype=weight.dtype, device="meta")  # fmt: skip

    def promise(self) -> dict[str, Any]:
        return {"zeros": self.pattern.sparsity if self.pattern else self.sparsity}


@dataclass(frozen=True, kw_only=True)
class TensorPruner(Pruner, TensorMethod):
    """Scores by the weights alone: `score(weight [out, in])`, low goes first."""

    def score(self, weight: Tensor) -> Tensor:
        raise AssertionError("a TensorPruner writes score")

    def tensor(self, weight: Tensor) -> Tensor | nn.Module:
        return self.stored(weight.masked_fill(self.removed(self.score(weight)), 0))


@dataclass(frozen=True, kw_only=True)
class LayerPruner(Pruner, LayerMethod):
    """Scores by weights and inputs: `score(weight [out, in], statistics)`; or writes `prune`, which also compensates."""

    def score(self, weight: Tensor, statistics: Statistics) -> Tensor:
        raise AssertionError("a LayerPruner writes score or prune")

    def prune(self, weight: Tensor, statistics: Statistics) -> Tensor:
        return weight.masked_fill(self.removed(self.score(weight, statistics)), 0)

    def layer(self, weight: Tensor, statistics: Statistics) -> Tensor | nn.Module:
        return self.stored(self.prune(weight, statistics))

"""Zero the weights with the least |weight| × input norm.

Sun, Liu, Bair, Kolter 2023, arXiv:2306.11695, section 3.
Differs: experts that saw no token are ranked by size alone. `by_sum` is the variant of the published code; its share of the sum is
found exactly, where that code halves an interval until the sparsity is within 0.001.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from modelwright.core.statistics import Statistics
from modelwright.methods.prune._mechanism import LayerPruner


@dataclass(frozen=True, kw_only=True)
class Wanda(LayerPruner):
    """Zero `sparsity` of each row by weight size times input norm; no weight update."""

    status: ClassVar[str] = "checked"
    gathers: ClassVar[tuple[str, ...]] = ("norm",)
    neutral = dict(sparsity=0.0)

    by_sum: bool = False  # each row loses the same share of the sum of its scores, rather than of its weights

    def problems(self) -> list[str]:
        both = "by_sum divides one sparsity among rows, and a pattern leaves none to divide. Choose one."
        return super().problems() + [both] * bool(self.by_sum and self.pattern)

    def competing(self) -> Literal["tensor", "row"]:
        return "tensor" if self.by_sum else "row"

    def score(self, weight: Tensor, statistics: Statistics) -> Tensor:
        score = weight.abs() * statistics.norm
        return share_up_to(score) if self.by_sum else score


def share_up_to(score: Tensor) -> Tensor:
    """For each score [out, in], what it and the lower ones have of its row's sum: 1 for the highest, in float64."""
    values, order = score.double().sort(dim=-1, stable=True)
    sums = values.cumsum(-1)
    return torch.empty_like(sums).scatter_(-1, order, sums / sums[:, -1:].clamp(min=torch.finfo(sums.dtype).tiny))

"""Zero the smallest weights.

Han, Pool, Tran, Dally 2015, arXiv:1506.02626, section 3.
Differs: one shot, no retraining; put `distill.recover` after it to follow the paper. The threshold is the one that
removes the asked share, not a multiple of the standard deviation; exactly that number goes, also where sizes tie.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from modelwright.methods.prune._mechanism import TensorPruner


@dataclass(frozen=True, kw_only=True)
class Magnitude(TensorPruner):
    """Zero `sparsity` of each matrix by size; needs no text."""

    status: ClassVar[str] = "checked"
    neutral = dict(sparsity=0.0)

    def score(self, weight: Tensor) -> Tensor:
        return weight.abs()

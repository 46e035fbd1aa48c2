"""Zero the smallest weights.

Han, Pool, Tran, Dally 2015, arXiv:1506.02626, section 3.
Differs: one shot, no retraining; put `distill.recover` after it to follow the paper. The threshold is the one that
removes the asked share, not a multiple of the standard deviation; exactly that number goes, also where sizes tie, but for
`scope: model`, where all of the threshold's own size go.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor, nn

from modelwright.maths.masks import find_cut, part_of
from modelwright.maths.slices import Entries
from modelwright.methods.prune._mechanism import TensorPruner


@dataclass(frozen=True, kw_only=True)
class Magnitude(TensorPruner):
    """Zero `sparsity` of each matrix, or of all together, by size; needs no text."""

    status: ClassVar[str] = "checked"
    neutral = dict(sparsity=0.0)

    scope: Literal["matrix", "model"] = "matrix"  # the weights of each matrix compete, or those of all

    def problems(self) -> list[str]:
        alone = isinstance(self.sparsity, float) and self.allocate == "uniform" and self.pattern is None
        wrong = (
            "scope: model has one threshold for all weights, so sparsity is one number, without a pattern and allocate. Leave these out."
        )
        return super().problems() + [wrong] * (self.scope == "model" and not alone)

    def surveying(self) -> bool:
        return self.scope == "model"

    def survey(self, weight: Entries, donors: list[Entries]) -> float:
        """The largest size that goes, where all weights compete."""
        count = weight.shape[0]
        return find_cut(lambda at: weight[at].float().abs(), count, part_of(self.sparsity, count)).value

    def score(self, weight: Tensor) -> Tensor:
        return weight.abs()

    def tensor(self, weight: Tensor, survey: float | None = None) -> Tensor | nn.Module:
        return super().tensor(weight) if survey is None else self.stored(weight.masked_fill(weight.abs() <= survey, 0))

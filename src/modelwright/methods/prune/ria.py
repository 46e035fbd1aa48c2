"""Zero the weights that matter least in their row and column, by what enters: relative importance and activations.

Zhang, Bai, Lin, Cao, Zheng, Ma, Ren, Cannistraci 2024, Plug-and-play: an efficient post-training pruning method for large
language models, ICLR, sections 4.1 and 4.2: (|Wᵢⱼ| / Σᵢ|Wᵢⱼ| + |Wᵢⱼ| / Σⱼ|Wᵢⱼ|) · ‖Xⱼ‖^a.
With `permute`, strong and weak inputs are first dealt evenly to the runs of a pattern, and then, with `assign`, given from run to
run by linear assignment, place by place.
Differs: inputs trade places only where that is free: neurons of an MLP, and channels inside a head. An order that would keep less
of the score is not taken. Assignments are over all runs at once, not over parts of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from modelwright.core.settings import number
from modelwright.core.statistics import Statistics
from modelwright.maths.ordering import best_order
from modelwright.methods.prune._mechanism import LayerPruner


@dataclass(frozen=True, kw_only=True)
class Ria(LayerPruner):
    """Zero `sparsity` of the weights by their part of row and column times input norm; no weight update."""

    status: ClassVar[str] = "checked"
    gathers: ClassVar[tuple[str, ...]] = ("norm",)
    neutral = dict(sparsity=0.0)

    power: float = number(0.5, low=0)  # of the input norm; 0 looks at weights alone
    scope: Literal["tensor", "row"] = "tensor"  # all weights of a matrix compete, or those of each row
    permute: bool = False  # first mix strong and weak inputs in each run of a pattern, where that is free
    assign: bool = True  # when inputs are mixed, go on by linear assignment; for wide MLPs this takes longest

    def competing(self) -> Literal["tensor", "row"]:
        return self.scope

    def score(self, weight: Tensor, statistics: Statistics) -> Tensor:
        size = weight.float().abs()
        least = torch.finfo(torch.float32).tiny
        relative = size / size.sum(0, keepdim=True).clamp_min(least) + size / size.sum(1, keepdim=True).clamp_min(least)
        return relative * statistics.norm**self.power

    def arranges(self) -> bool:
        return self.permute

    def arrange(self, weight: Tensor, statistics: Statistics, inputs: Tensor) -> Tensor | None:
        assert self.pattern is not None
        if inputs.shape[2] % self.pattern.of:
            return None
        return best_order(self.score(weight, statistics), inputs, (self.pattern.keep, self.pattern.of), assign=self.assign)

    def problems(self) -> list[str]:
        lacking = ["permute mixes the inputs of a pattern's runs, and there is no pattern. Give one, such as 2:4."]
        return super().problems() + lacking * (self.permute and not self.pattern)

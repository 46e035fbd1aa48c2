"""Keep the singular values that matter for the layers' outputs: truncation under the inputs' second moment.

Wang, Zheng, Wan, Zhang 2024, arXiv:2403.07378, section 3.1 (truncation-aware whitening).
Differs: the inputs are those that the already factored blocks before give. On them the truncation is the best factor
of its rank, so the paper's closed-form update of the left factor would change nothing and is left out. A singular
moment has the least multiple of 1 added that makes it positive.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from modelwright.core.method import LayerMethod
from modelwright.core.statistics import Statistics
from modelwright.maths.low_rank import whitening
from modelwright.methods.factor._mechanism import Factoriser


@dataclass(frozen=True, kw_only=True)
class SvdLlm(Factoriser, LayerMethod):
    """Replace matrices by two factors whose outputs on the text are closest."""

    status: ClassVar[str] = "checked"
    gathers: ClassVar[tuple[str, ...]] = ("moment",)
    neutral = dict(keep=1.0)

    def metric(self, statistics: Statistics) -> Tensor:
        return whitening(statistics.moment)

    def layer(self, weight: Tensor, statistics: Statistics) -> Tensor | nn.Module:
        return self.factored(weight, self.metric(statistics))

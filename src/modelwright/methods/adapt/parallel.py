"""Train small bottlenecks beside layers: parallel adapters.

Hu, Lan, Wang, Xu, Lim, Lee, Bing, Poria 2023, arXiv:2304.01933, section 2.2, after He et al. 2021, arXiv:2110.04366:
y = W x + scale · U φ(D x). Without a curve between D and U it is LoRA with alpha / rank = scale.
Differs: U begins at zero, so that attaching changes no output; the authors' code has normal numbers in both as a default.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from modelwright.blocks.bottlenecks import Narrow
from modelwright.blocks.bottlenecks import Parallel as ParallelPart
from modelwright.methods.adapt._mechanism import Bottlenecked


@dataclass(frozen=True, kw_only=True)
class Parallel(Bottlenecked):
    """Train two narrow matrices with a curve between them beside each layer; stays beside the model when trained."""

    status: ClassVar[str] = "checked"

    def part(self, weight: Tensor, bias: Tensor | None) -> ParallelPart:
        rows, columns = weight.shape
        return ParallelPart(Narrow(rows, columns, self.inner, self.activation, self.scale))

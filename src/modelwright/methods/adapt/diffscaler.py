"""Train a scale, a shift and a small bottleneck for each layer, one set for each task: DiffScaler.

Nair, Valanarasu, Patel 2024, arXiv:2404.09976, section 3 (Affiner): y' = (1 + a) ⊙ y + β + t · U relu(D x), with a, β and U at zero first.
Beside a convolution D and U are of one place, under the middle of its kernel. Several tasks are several adapters of one model.
Without the bottleneck it is `adapt.ssf`; without the curve it is that and LoRA, and goes into the weight.
Differs: a scales the layer's frozen bias too, which β makes up for; t is a setting and does not train.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from modelwright.blocks._part import Part
from modelwright.blocks.bottlenecks import Narrow, Parallel
from modelwright.blocks.reparametrised import Product, Reparametrised
from modelwright.core.method import LayerAdapter
from modelwright.core.settings import count, number


@dataclass(frozen=True, kw_only=True)
class Diffscaler(LayerAdapter):
    """Train scales, shifts and narrow curved paths beside linears and convolutions; made for one model with many tasks."""

    status: ClassVar[str] = "checked"
    sized_by: ClassVar[tuple[str, ...]] = ("inner",)
    on_convolutions: ClassVar[bool] = True
    suffices: ClassVar[frozenset[str]] = frozenset({"packed"})
    neutral = {}  # a, β and U start at zero
    sites: ClassVar[tuple[str, ...]] = ("attn", "mlp", "linear", "conv", "embed.patch")

    inner: int = count(8, low=0)  # rows of D, columns of U; 0 for no bottleneck
    activation: Literal["relu", "none"] = "relu"  # of the bottleneck
    scope: Literal["channel", "layer"] = "channel"  # what has one scale a
    scale: float = number(1.0)  # t, of what the bottleneck gives

    def part(self, weight: Tensor, bias: Tensor | None) -> Part:
        rows, columns = weight.shape[:2]
        factor = nn.Parameter(torch.ones(rows if self.scope == "channel" else 1))
        shift = nn.Parameter(torch.zeros(rows))
        if self.inner == 0:
            return Reparametrised(factor=factor, shift=shift)
        narrow = Narrow(rows, columns, self.inner, "relu", self.scale)
        if self.activation == "none":
            return Reparametrised(Product(narrow.up, narrow.down, scale=self.scale), factor=factor, shift=shift)
        return Parallel(narrow, under=Reparametrised(factor=factor, shift=shift))

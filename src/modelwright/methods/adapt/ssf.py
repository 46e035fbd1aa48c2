"""Train a scale and a shift of every layer's outputs, which then go into the weights: SSF.

Lian, Zhou, Feng, Wang 2022, arXiv:2210.08823, section 3.2: y' = γ ⊙ y + β with γ and β of one number for each channel, after each linear,
convolution and norm. They are absorbed as W' = diag(γ) W, b' = γ ⊙ b + β, in a norm alike; a layer without a bias then gains one.
Differs: with `noise: 0`, the default, γ begins at 1 and β at 0, so that attaching changes no output; the authors' begin
a little apart (0.02). A norm without a bias, such as RMSNorm, is only scaled: what its shift would add to the linears behind it is
a constant, which their own shifts can be. The head of the model does not train.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from modelwright.blocks.reparametrised import Reparametrised
from modelwright.core.method import LayerAdapter
from modelwright.core.settings import number


@dataclass(frozen=True, kw_only=True)
class Ssf(LayerAdapter):
    """Train two numbers for each output channel of linears, convolutions and norms; folds into the weights."""

    status: ClassVar[str] = "checked"
    on_convolutions: ClassVar[bool] = True
    suffices: ClassVar[frozenset[str]] = frozenset({"packed"})
    neutral = {}  # γ starts at 1, β at 0
    sites: ClassVar[tuple[str, ...]] = ("attn", "mlp", "linear", "conv", "embed.patch", "norm")
    on_norms: ClassVar[bool] = True
    grouped: ClassVar[bool] = True

    shift: bool = True  # train β too
    noise: float = number(0.0, low=0)  # standard deviation of γ around 1 and of β around 0 at first; the authors' is 0.02

    def part(self, weight: Tensor, bias: Tensor | None) -> Reparametrised:
        factor = nn.Parameter(1 + self.noise * torch.randn(len(weight)))
        only_scaled = not self.shift or weight.ndim == 1 and bias is None
        return Reparametrised(factor=factor, shift=None if only_scaled else nn.Parameter(self.noise * torch.randn(len(weight))))

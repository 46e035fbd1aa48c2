"""Train two low-rank updates between which the quality of each input decides: PETALface.

Narayan et al. 2024, arXiv:2412.07771: y = W x + s B₁ A₁ (1 - α) x + s B₂ A₂ α x with α = 0.5 + (q - τ)
for a quality q of each sample and a threshold τ. The scorer is any function of a batch that gives 0 to 1 for each sample: run and
train inside `with blocks.gated.scored(model, scorer):`. Outside of it α is the setting `quality`, and the updates fold into the weight.
Differs: α is held within 0 and 1, which the authors' code leaves out. What the authors train beside it, a LoRA on the last
projection and the head, are other steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from modelwright.blocks.gated import Fixed, Opposed, Quality
from modelwright.blocks.reparametrised import Product
from modelwright.core.method import LayerAdapter
from modelwright.core.settings import count, fraction, number
from modelwright.methods.adapt._mechanism import beyond


@dataclass(frozen=True, kw_only=True)
class Petalface(LayerAdapter):
    """Adapt to good and to poor inputs at once, each with its own low-rank update; for low resolution, noise, other languages."""

    status: ClassVar[str] = "checked"
    sized_by: ClassVar[tuple[str, ...]] = ("rank",)
    on_convolutions: ClassVar[bool] = True
    suffices: ClassVar[frozenset[str]] = frozenset({"packed"})
    neutral = {}  # both B start at zero
    sites: ClassVar[tuple[str, ...]] = ("attn.{q,k,v,qkv}", "linear")

    rank: int = count(8)  # rows of each A, columns of each B
    scale: float = number(1.0)  # s, of both updates
    dropout: float = fraction(0.1, high=0.99)  # of what the updates give, while training
    threshold: float = fraction(0.5)  # τ, the quality at which both count half
    quality: float = fraction(0.5)  # α where no scorer is at work

    def shared(self, sizes: Sequence[tuple[int, int]]) -> nn.Module:
        return Quality(self.quality, self.threshold)

    def unfit(self, shape: tuple[int, ...]) -> str:
        return beyond(self.rank, shape)

    def part(self, weight: Tensor, bias: Tensor | None) -> Fixed:
        def update() -> Product:
            up, down = torch.zeros(len(weight), self.rank), torch.randn(self.rank, weight.shape[1]) / self.rank
            return Product(nn.Parameter(up), nn.Parameter(down), scale=self.scale)

        return Fixed((update(), update()), Opposed(), dropout=self.dropout)

"""Train the pivots of each frozen matrix: LoLDU.

Shi, Wei, Wu, Huang, Sun, Wang, Wang, Sui, Yuan 2024, arXiv:2410.13618, section 3: W = P L diag(z) Ũ by elimination, of which the first r
columns of P L and rows of Ũ are held and z trains. What is added to W is P L_r (s diag(z) - s₀ diag(z₀)) Ũ_r with s₀ = alpha / rank, which
is nothing at first. The pivots are in no order, so that the first r are not the largest.
Differs: z always begins at the pivots. The other beginnings of the authors' code change the function there; were each taken from W
itself, all would give the same steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from modelwright.blocks.reparametrised import Product, Reparametrised
from modelwright.core.method import LayerAdapter
from modelwright.core.settings import count, number
from modelwright.maths.triangular import lower_diagonal_upper
from modelwright.methods.adapt._mechanism import within


@dataclass(frozen=True, kw_only=True)
class Loldu(LayerAdapter):
    """Train one number for each step of a matrix's elimination; as few as SVFit, without a decomposition that takes long."""

    status: ClassVar[str] = "checked"
    sized_by: ClassVar[tuple[str, ...]] = ("rank",)
    suffices: ClassVar[frozenset[str]] = frozenset({"packed"})
    neutral = {}  # pivots and scale begin as they are
    small = dict(rank=8)

    rank: int = count(768)  # pivots that train, from the first; as many as there are at most
    alpha: float = number(1.0)  # of the scale s₀ = alpha / rank
    train_scale: bool = False  # train s too, one number for each matrix

    def problems(self) -> list[str]:
        return ["alpha is 0, so that nothing would change. Give another number."] * (self.alpha == 0)

    def otherwise(self, shape: tuple[int, ...]) -> str:
        return within(self.rank, shape)[1]

    def part(self, weight: Tensor, bias: Tensor | None) -> Reparametrised:
        rank, scale = within(self.rank, weight.shape)[0], self.alpha / self.rank
        lower, pivots, upper = (value.float() for value in lower_diagonal_upper(weight))
        trained = nn.Parameter(torch.tensor(scale)) if self.train_scale else scale
        first = pivots[:rank].clone()
        return Reparametrised(
            Product(lower[:, :rank].contiguous(), upper[:rank].contiguous(), nn.Parameter(first), scale * first, scale=trained)
        )

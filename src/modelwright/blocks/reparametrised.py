"""The reparametrised layer: weight mask ⊙ [(I + Λ) W + s · B C A + scatter], bias (I + Λ) b + β."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from modelwright.blocks._part import Dense, Layer, Part, placed, places, shaped


class Product(nn.Module):
    """s · B C A, less s · B C₀ A where that is not to count.

    up: B [out, r]. down: A [r, in]. core: C, [r] for a diagonal, [r, r], or None for the identity. fixed: C₀, like C. Each is a parameter
    where it trains, and a plain tensor where it is held. scale: s. dropout: of the inputs, while training.
    """

    up: Tensor
    down: Tensor
    core: Tensor | None
    fixed: Tensor | None

    def __init__(self, up: Tensor, down: Tensor, core: Tensor | None = None, fixed: Tensor | None = None, *, scale: float = 1.0,
                 dropout: float = 0.0):  # fmt: skip
        super().__init__()
        hold(self, up=up, down=down, core=core, fixed=fixed)
        self.scale, self.dropout = scale, nn.Dropout(dropout)

    def middle(self) -> Tensor | None:
        """C - C₀."""
        return self.core if self.core is None or self.fixed is None else self.core - self.fixed

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] → [..., out], in the product's own dtype."""
        middle, inner = self.middle(), self.dropout(x.to(self.down.dtype)) @ self.down.T
        if middle is not None:
            inner = inner * middle if middle.ndim == 1 else inner @ middle.T
        return (inner * self.scale if self.scale != 1 else inner) @ self.up.T

    def factors(self) -> tuple[Tensor, Tensor]:
        """s · B (C - C₀) [out, r], and A [r, in]."""
        middle, up = self.middle(), self.up * self.scale
        if middle is None:
            return up, self.down
        return up * middle if middle.ndim == 1 else up @ middle, self.down

    def on(self, weight: Tensor) -> Tensor:
        """The product times a matrix [in, ...], or a vector [in]."""
        up, down = self.factors()
        return up @ (down @ weight)


def low_rank(rows: int, columns: int, rank: int, scale: float = 1.0, dropout: float = 0.0) -> Product | None:
    """B = 0 [rows, rank], and A [rank, columns] uniform within ±1/√columns, which train; None of rank 0."""
    if rank == 0:
        return None
    down = nn.init.kaiming_uniform_(torch.empty(rank, columns), a=math.sqrt(5))
    return Product(nn.Parameter(torch.zeros(rows, rank)), nn.Parameter(down), scale=scale, dropout=dropout)


class Reparametrised(Part):
    """A layer with an update beside its weight, on its outputs, and with scales and shifts of these; what is None is left out.

    update: s B C A, added to the weight, of a convolution at the middle of its kernel. outer: Λ as a product, [out, out].
    factor: 1 + Λ as a diagonal [out]. shift: β [out].
    The layer gives (I + Λ) y + s B C A x + β for its own outputs y.
    """

    factor: Tensor | None
    shift: Tensor | None

    def __init__(self, update: Product | None = None, *, outer: Product | None = None, factor: Tensor | None = None,
                 shift: Tensor | None = None):  # fmt: skip
        super().__init__()
        assert outer is None or factor is None, "Λ is a diagonal or a product"
        self.update, self.outer = update, outer
        hold(self, factor=factor, shift=shift)

    def forward(self, x: Tensor, layer: Layer) -> Tensor:
        own = layer(x)
        total = own if self.factor is None else own * shaped(self.factor.to(own.dtype), own, layer.module)
        if self.outer is not None:
            total = total + self.outer(own).to(own.dtype)
        if self.update is not None:
            total = total + placed(self.update(places(x, own, layer.module)), layer.module).to(own.dtype)
        return total if self.shift is None else total + shaped(self.shift.to(own.dtype), own, layer.module)

    def effective(self, weight: Tensor, bias: Tensor | None) -> Dense:
        """The weight and bias of the layer with this part, through which gradients pass."""
        total, moved = weight, bias
        if self.factor is not None:
            total = weight * self.factor.view(-1, *[1] * (weight.ndim - 1))
            moved = None if bias is None else bias * self.factor
        if self.outer is not None:
            total = total + self.outer.on(weight.flatten(1)).view_as(weight)
            moved = None if bias is None or moved is None else moved + self.outer.on(bias)
        if self.update is not None:
            up, down = self.update.factors()
            total = total + centred(up @ down, weight)
        if self.shift is not None:
            moved = self.shift if moved is None else moved + self.shift
        return total, moved

    @torch.no_grad()
    def merged(self, weight: Tensor, bias: Tensor | None) -> Dense:
        total, moved = self.effective(weight.float(), None if bias is None else bias.float())
        return total.to(weight.dtype), None if moved is None else moved.to(weight.dtype)

    def factors(self) -> tuple[Tensor, Tensor] | None:
        plain = self.update is not None and self.outer is None and self.factor is None and self.shift is None
        return self.update.factors() if plain and self.update is not None else None


def centred(change: Tensor, weight: Tensor) -> Tensor:
    """A matrix [out, in] as a change of a weight: of a convolution's at the middle of its kernel."""
    if weight.ndim == 2:
        return change
    spread = change.new_zeros(weight.shape)
    middle: Any = (..., *(side // 2 for side in weight.shape[2:]))
    spread[middle] = change
    return spread


def hold(module: nn.Module, **values: Tensor | None) -> None:
    """Give a module tensors by name: those that are parameters train, the others are saved as they are."""
    for name, value in values.items():
        if isinstance(value, nn.Parameter) or value is None:
            module.register_parameter(name, value)
        else:
            module.register_buffer(name, value)

"""Bottlenecks U φ(D x) before, after or beside a layer; they are not linear, and so no change of a weight."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from modelwright.blocks._part import Layer, Part, placed, places

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "tanh": torch.tanh, "relu": torch.relu, "gelu": nn.functional.gelu, "silu": nn.functional.silu, "none": lambda x: x,
}  # fmt: skip
Activation = Literal["tanh", "relu", "gelu", "silu", "none"]


class Narrow(nn.Module):
    """scale · U φ(D x), without biases. down: D [inner, in]; up: U [out, inner], at zero first. dropout: of U's inputs, in training."""

    def __init__(self, rows: int, columns: int, inner: int, activation: Activation, scale: float = 1.0, dropout: float = 0.0):
        super().__init__()
        self.down = nn.Parameter(nn.init.kaiming_uniform_(torch.empty(inner, columns), a=math.sqrt(5)))
        self.up = nn.Parameter(torch.zeros(rows, inner))
        self.activation, self.scale, self.dropout = activation, scale, nn.Dropout(dropout)

    def matrix(self) -> Tensor:
        """U [out, inner], as it is used now."""
        return self.up

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] → [..., out], in x's dtype; computed in the bottleneck's own."""
        inner = self.dropout(ACTIVATIONS[self.activation](x.to(self.down.dtype) @ self.down.T))
        return (self.scale * (inner @ self.matrix().T)).to(x.dtype)


class Split(Narrow):
    """A bottleneck whose U is the sum of experts, each with entries of its own at places of its own; in training one of them, by chance.

    experts: the entries of each, at zero first. places: [out · inner], in which those of the experts follow each other. The sum of all is
    divided by `divisor`. An expert that is not used has no gradient, so that no optimizer moves it.
    """

    places: Tensor

    def __init__(self, rows: int, columns: int, inner: int, activation: Activation, experts: int, *, divisor: float, scale: float = 1.0,
                 dropout: float = 0.0):  # fmt: skip
        super().__init__(rows, columns, inner, activation, scale, dropout)
        del self.up
        self.shape, self.divisor = (rows, inner), divisor
        self.register_buffer("places", torch.randperm(rows * inner, dtype=torch.int32))
        self.experts = nn.ParameterList(torch.zeros(len(part)) for part in self.places.tensor_split(experts))

    def matrix(self) -> Tensor:
        groups = self.places.tensor_split(len(self.experts))
        chosen = [int(torch.randint(len(groups), (), device="cpu"))] if self.training else range(len(groups))
        flat = self.down.new_zeros(self.shape[0] * self.shape[1])
        for number in chosen:
            flat = flat.index_put((groups[number].long(),), self.experts[number])
        return (flat if self.training else flat / self.divisor).view(self.shape)


class Series(Part):
    """A bottleneck on what a layer is given, W (x + f(x)), or on what it gives, y + f(y)."""

    mergeable = False

    def __init__(self, bottleneck: nn.Module, side: Literal["before", "after"]):
        super().__init__()
        self.bottleneck, self.side = bottleneck, side

    def forward(self, x: Tensor, layer: Layer) -> Tensor:
        if self.side == "before":
            return layer(x + self.bottleneck(x))
        own = layer(x)
        return own + self.bottleneck(own)


class Parallel(Part):
    """A bottleneck beside a layer, y + f(x); beside a convolution, of the inputs under the middle of its kernel.

    under: what stands on the layer itself.
    """

    mergeable = False

    def __init__(self, bottleneck: nn.Module, under: Part | None = None):
        super().__init__()
        self.bottleneck, self.under = bottleneck, under

    def forward(self, x: Tensor, layer: Layer) -> Tensor:
        own = (layer if self.under is None else layer.under(self.under))(x)
        return own + placed(self.bottleneck(places(x, own, layer.module)), layer.module).to(own.dtype)

"""Bottlenecks U φ(D x) before, after or beside a layer; they are not linear, and so no change of a weight."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from modelwright.blocks._part import Layer, Part

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "tanh": torch.tanh, "relu": torch.relu, "gelu": nn.functional.gelu, "silu": nn.functional.silu, "none": lambda x: x,
}  # fmt: skip
Activation = Literal["tanh", "relu", "gelu", "silu", "none"]


class Narrow(nn.Module):
    """scale · U φ(D x), without biases. down: D [inner, in]; up: U [out, inner], at zero first."""

    def __init__(self, rows: int, columns: int, inner: int, activation: Activation, scale: float = 1.0):
        super().__init__()
        self.down = nn.Parameter(nn.init.kaiming_uniform_(torch.empty(inner, columns), a=math.sqrt(5)))
        self.up = nn.Parameter(torch.zeros(rows, inner))
        self.activation, self.scale = activation, scale

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] → [..., out], in x's dtype; computed in the bottleneck's own."""
        inner = ACTIVATIONS[self.activation](x.to(self.down.dtype) @ self.down.T)
        return (self.scale * (inner @ self.up.T)).to(x.dtype)


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
    """A bottleneck beside a layer, y + f(x)."""

    mergeable = False

    def __init__(self, bottleneck: nn.Module):
        super().__init__()
        self.bottleneck = bottleneck

    def forward(self, x: Tensor, layer: Layer) -> Tensor:
        own = layer(x)
        return own + self.bottleneck(x).to(own.dtype)

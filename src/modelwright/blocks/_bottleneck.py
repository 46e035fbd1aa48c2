"""The layers of an adapter or projection that goes through another width."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Bottleneck(nn.Module):
    """U f(D norm(x) + b) + c, with f the rectifier unless another is given.

    Stored: entry.weight and entry.bias [features], down.weight [inner, features], up.weight [features, inner], and their biases.
    """

    def __init__(self, features: int, inner: int, dtype: torch.dtype | None = None, device: torch.device | str | None = None,
                 activation: Callable[[Tensor], Tensor] = F.relu):  # fmt: skip
        super().__init__()
        self.activation = activation
        self.entry = nn.LayerNorm(features, dtype=dtype, device=device)
        self.down = nn.Linear(features, inner, dtype=dtype, device=device)
        self.up = nn.Linear(inner, features, dtype=dtype, device=device)

    def begin(self, rng: torch.Generator) -> None:
        """Values of an adapter that gives zeros, and learns from there."""
        with torch.no_grad():
            self.down.weight.copy_(torch.randn(self.down.weight.shape, generator=rng) * self.down.in_features**-0.5)
            self.entry.weight.fill_(1)
            for value in (self.entry.bias, self.down.bias, self.up.weight, self.up.bias):
                value.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """x [..., features] → the same shape."""
        return self.up(self.activation(self.down(self.entry(x))))

"""Bottlenecks whose matrices are sums of Kronecker products."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from modelwright.blocks._part import Layer, Part

SHARED, OWN = 1e-4, 0.01  # standard deviation of slow matrices at first


class Slow(nn.Module):
    """The slow matrices S [n, n, n] of the maps that share them."""

    def __init__(self, terms: int, spread: float = SHARED):
        super().__init__()
        self.matrices = nn.Parameter(spread * torch.randn(terms, terms, terms))


class KroneckerMap(nn.Module):
    """x H + b with H = Σ_t S_t ⊗ F_t [in, out]; S [n, n, n] is given, or its own.

    F_t [in / n, out / n] is left_t right_t with left [n, in / n, rank] and right [n, rank, out / n], or of rank 0 the dense left.
    """

    def __init__(self, columns: int, rows: int, terms: int, rank: int, own: bool):
        super().__init__()
        self.left = nn.Parameter(_glorot(terms, columns // terms, rank or rows // terms))
        self.right = nn.Parameter(_glorot(terms, rank, rows // terms)) if rank else None
        self.bias = nn.Parameter(torch.zeros(rows))
        self.slow = Slow(terms, OWN) if own else None

    def forward(self, x: Tensor, shared: Slow | None = None) -> Tensor:
        """x [..., in] → [..., out]."""
        slow = self.slow if shared is None else shared
        assert slow is not None
        inner = torch.einsum("...ap,tpr->...atr", x.unflatten(-1, (len(self.left), -1)), self.left)
        inner = torch.einsum("...atr,tab->...btr", inner, slow.matrices)
        total = inner.sum(-2) if self.right is None else torch.einsum("...btr,trq->...bq", inner, self.right)
        return total.flatten(-2) + self.bias


class KroneckerBottleneck(Part):
    """y + up(gelu(down(y))) for a layer's outputs y [..., out]; the maps' slow matrices are shared, or each map's own."""

    mergeable = False

    def __init__(self, width: int, inner: int, terms: int, rank: int, own: bool):
        super().__init__()
        self.down, self.up = (KroneckerMap(*sizes, terms, rank, own) for sizes in ((width, inner), (inner, width)))
        self.own = own

    def forward(self, x: Tensor, layer: Layer) -> Tensor:
        y, slow = layer(x), None if self.own else self.shared
        inner = nn.functional.gelu(self.down(y.to(self.down.left.dtype), slow), approximate="tanh")
        return y + self.up(inner, slow).to(y.dtype)


def _glorot(*sizes: int) -> Tensor:
    """Matrices [n, in, out], uniform within ±√(2 · 6 / (in + out))."""
    bound = math.sqrt(12 / (sizes[1] + sizes[2]))
    return torch.empty(sizes).uniform_(-bound, bound)

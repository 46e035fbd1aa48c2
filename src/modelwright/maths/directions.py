"""Directions of vectors that carry most of them."""

from __future__ import annotations

import torch
from torch import Tensor


def principal(moment: Tensor, damp: float) -> tuple[Tensor, Tensor]:
    """The energy along each principal direction [width], greatest first, and the directions as columns [width, width].

    moment: the sum of x xᵀ [width, width]. damp: what is added to its diagonal, as a share of the diagonal's mean.
    """
    damped = moment + damp * moment.diagonal().mean() * torch.eye(len(moment), dtype=moment.dtype)
    _, vectors = torch.linalg.eigh(damped)
    vectors = vectors.flip(1)
    return (vectors * (moment @ vectors)).sum(0), vectors


def onto(basis: Tensor, x: Tensor) -> Tensor:
    """x [..., width] without what lies outside the orthonormal columns of a basis [width, kept], in x's dtype."""
    basis = basis.to(x.device, torch.float64)
    return (x.double() @ basis @ basis.T).to(x.dtype)

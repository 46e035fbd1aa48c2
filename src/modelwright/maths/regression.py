"""The matrix whose outputs are nearest to those of several matrices, each on inputs of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

NOISE = 1e-6  # share of the largest eigenvalue below which one of a moment summed in float32 says nothing


def shrunk(moment: Tensor, shrink: float) -> Tensor:
    """A moment [in, in] in float64 with what is off its diagonal times `shrink`, 0 to 1."""
    exact = moment.double()
    diagonal = exact.diagonal().clone()
    exact = exact * shrink
    exact.diagonal().copy_(diagonal)
    return exact


def nearest(moments: Sequence[Tensor], shares: Sequence[float]) -> Callable[[Sequence[Tensor]], Tensor]:
    """A function of weights W_i [out, in] that gives the W with the least Σ_i s_i tr((W - W_i) G_i (W - W_i)ᵀ).

    moments: G_i [in, in], symmetric, of the inputs of W_i, one for each weight. shares: s_i, positive.

    The result has the dtype of the first weight: W = M + (Σ s_i (W_i - M) G_i)(Σ s_i G_i)⁻¹ with M = Σ s_i W_i / Σ s_i,
    which is the textbook's (Σ s_i W_i G_i)(Σ s_i G_i)⁻¹. Where Σ s_i G_i is singular, its pseudoinverse stands for the
    inverse, so that M stays for inputs that never came.
    """
    total = sum(share * moment.double() for share, moment in zip(shares, moments, strict=True))
    assert isinstance(total, Tensor)
    lower, failed = torch.linalg.cholesky_ex(total)
    spread = lower.diagonal()
    sound = not failed and bool((spread.min() / spread.max()) ** 2 > 1e-8)
    inverse = None if sound else torch.linalg.pinv(total, rtol=NOISE, hermitian=True)

    def merged(weights: Sequence[Tensor]) -> Tensor:
        mean = sum(share * weight.double() for share, weight in zip(shares, weights, strict=True)) / sum(shares)
        pull = sum(
            share * (weight.double() - mean) @ moment.double() for share, weight, moment in zip(shares, weights, moments, strict=True)
        )
        assert isinstance(pull, Tensor)
        change = torch.cholesky_solve(pull.mT, lower).mT if inverse is None else pull @ inverse
        return (mean + change).to(weights[0].dtype)

    return merged

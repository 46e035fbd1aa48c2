"""The best product of two thin matrices for a weight, under a metric.

W [out, in] ≈ B A with B [out, r] and A [r, in] that minimise ‖(W - B A) S‖. With S = I this is the plain truncated
singular value decomposition; with S Sᵀ = Σ x xᵀ it is the error of the layer's outputs (SVD-LLM, 2403.07378); with S
diagonal it is ASVD (2312.05821).
"""

from __future__ import annotations

import torch
from torch import Tensor

from modelwright.core.errors import SiteError


def factor(weight: Tensor, rank: int, metric: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The two factors of the best approximation of a rank: (B [out, rank], A [rank, in]) in weight's dtype.

    weight: [out, in]. rank: 1 to min(out, in). metric: S, lower triangular [in, in] from `whitening`, or the diagonal
    of one [in]; None is the identity. Then ‖(W - B A) S‖² is the sum of the squares of the singular values of W S
    that are dropped. The singular values are shared evenly: each factor has their roots.
    Raises SiteError for NaN and infinity.
    Differs: S is never inverted, since U_r s_r V_rᵀ S⁻¹ = U_r U_rᵀ W; so it may be singular.
    """
    exact = weight.double()
    if not exact.isfinite().all() or metric is not None and not metric.isfinite().all():
        raise SiteError(
            "A weight or its inputs are NaN or infinite, so that it has no factors. Look for NaN in the model, or leave it out."
        )
    if metric is None:
        stretched = exact
    elif metric.ndim == 1:
        stretched = exact * metric.double()
    else:
        stretched = exact @ metric.double()
    left, values, _ = torch.linalg.svd(stretched, full_matrices=False)
    left = left[:, :rank]
    roots = values[:rank].clamp(min=values[0] * 1e-12).sqrt()
    roots = torch.where(roots > 0, roots, 1.0)
    tall = left * roots
    wide = (left.t() @ exact) / roots[:, None]
    return tall.to(weight.dtype), wide.to(weight.dtype)


def whitening(moment: Tensor) -> Tensor:
    """S with S Sᵀ = `moment`, lower triangular [in, in] float64, for a second moment [in, in].

    A moment that is not positive definite is lifted: -λ_min + 1e-6 of its mean diagonal is added to the diagonal.
    """
    exact = moment.double()
    lower, failed = torch.linalg.cholesky_ex(exact)
    if failed:
        lift = 1e-6 * exact.diagonal().mean() - torch.linalg.eigvalsh(exact)[0].clamp(max=0)
        lower = torch.linalg.cholesky(exact + lift * torch.eye(len(exact), dtype=exact.dtype, device=exact.device))
    return lower


def rank_for(keep: float, rows: int, columns: int) -> int:
    """The rank whose two factors hold at most `keep` of the entries of a [rows, columns] weight; at least 1."""
    return max(1, int(keep * rows * columns / (rows + columns)))


def change_factors(change: Tensor, most: int, keep: float = 1.0, floor: float = 0.0) -> tuple[Tensor, Tensor, float]:
    """The factors of a change at the least rank that does: (B [out, r], A [r, in], the share of Σ σ² that they hold).

    change: [out, in]. most: the highest rank. keep: the share of Σ σ² to hold, 0 to 1. floor: singular values up to this
    count as rounding. The rank is 0 where nothing is left; the roots of the singular values are shared evenly.
    """
    left, values, right = torch.linalg.svd(change.double(), full_matrices=False)
    energy = values.square()
    total = energy.sum()
    held = energy.cumsum(0)
    needed = int((held < keep * total * (1 - 1e-12)).sum()) + 1
    rank = min(most, needed, int((values > floor).sum()))
    share = float(held[rank - 1] / total) if rank else float(total == 0)
    roots = values[:rank].sqrt()
    return (left[:, :rank] * roots).to(change.dtype), (roots[:, None] * right[:rank]).to(change.dtype), share


def product_factors(tall: Tensor, wide: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best factors (B [out, r], A [r, in]) of the product of tall [out, n] and wide [n, in], r at most `rank`.

    Through the triangular factors of both, so that the product itself is never formed.
    """
    left, above = torch.linalg.qr(tall.double())
    right, below = torch.linalg.qr(wide.double().mT)
    up, down, _ = change_factors(above @ below.mT, rank)
    return (left @ up).to(tall.dtype), (down @ right.mT).to(wide.dtype)


def rounding(weight: Tensor) -> float:
    """The largest singular value that rounding alone gives a difference of two weights [out, in] of this dtype."""
    rms = float(weight.float().square().mean().sqrt())
    return torch.finfo(weight.dtype).eps * rms * (weight.shape[0] ** 0.5 + weight.shape[1] ** 0.5)


def gradient_of_product(tall: Tensor, wide: Tensor, tall_gradient: Tensor, wide_gradient: Tensor) -> Tensor:
    """An estimate of the gradient of W [out, in] from those of B [out, r] and A [r, in] alone, where W + s B A is used.

    dB A + B dA - dB dA: what a step of size 1 against both gradients takes from B A (LoRAPrune, 2305.18403).
    """
    return tall_gradient @ wide + tall @ wide_gradient - tall_gradient @ wide_gradient


def from_orthogonal(directions: Tensor) -> Tensor:
    """How far directions A [r, n] are from standing at right angles with length one: ‖A Aᵀ - I‖_F."""
    return (directions @ directions.T - torch.eye(len(directions), device=directions.device)).norm()

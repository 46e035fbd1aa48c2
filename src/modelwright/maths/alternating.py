"""The least squares fit with few nonzeros: alternating directions for the support, conjugate gradients on it.

For y = W x with second moment C of the inputs, min tr((W - Ŵ) C (W - Ŵ)ᵀ) with only so many entries of W not 0; ALPS, Meng,
Behdin, Wang, Mazumder 2024, arXiv:2406.07831. Matrices are written as there, B = Wᵀ [in, out].
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Support = Callable[[Tensor], Tensor]  # from B [in, out] to the boolean mask of what is kept of it

MOST = 1e6  # the largest penalty
EVERY = 3  # steps between looks at how much of the support changed


def alternate(moment: Tensor, weight: Tensor, support: Support, *, penalty: float = 0.1, steps: int = 300) -> Tensor:
    """The support that ADMM finds for B: minimise tr((B - B̂)ᵀ C (B - B̂)) with B = D, D of few nonzeros.

    moment: C [in, in], positive definite, with a diagonal of ones. weight: B̂ [in, out]. support: which entries count.
    penalty: ρ, with which the two are held together at first. It grows while the support changes, and is made smaller
    until it does.

    Returns B [in, out] in float32, which is best where its own support is.
    """
    values, vectors = torch.linalg.eigh(moment.double())
    values, vectors = values.float(), vectors.float()
    goal = moment.float() @ weight
    start = weight * support(weight)
    b, d, dual = weight, start, torch.zeros_like(weight)
    kept, grown = start != 0, False
    for step in range(1, steps + 1):
        b = vectors @ ((vectors.T @ (goal - dual + penalty * d)) / (values + penalty)[:, None])
        near = b + dual / penalty
        d = near * support(near)
        dual = dual + penalty * (b - d)
        if step % EVERY:
            continue
        now = d != 0
        changed, kept = float((now & ~kept).sum() / max(int(now.sum()), 1)), now
        if changed == 0:
            if grown:
                break
            penalty /= 5
        elif grown or changed > 0.005:
            penalty, grown = min(penalty * (1.3 if changed > 0.1 else 1.2 if changed > 0.005 else 1.1), MOST), True
        else:  # it was too large from the start
            penalty /= 5
            b, d, dual, kept = weight, start, torch.zeros_like(weight), start != 0
        if step >= 30 and changed < 3e-4:
            break
    return b


def on_support(moment: Tensor, weight: Tensor, b: Tensor, kept: Tensor, steps: int = 10) -> Tensor:
    """Conjugate gradients from B for C B = C B̂, on the entries `kept` alone, all columns at once; the others become 0.

    moment: C [in, in]. weight: B̂; b: B; kept: boolean; all [in, out].
    """
    b = b * kept
    residual = (moment @ (weight - b)) * kept
    direction, size = residual, residual.square().sum(0)
    least = torch.finfo(b.dtype).eps ** 2 * size
    for _ in range(steps):
        ahead = (moment @ direction) * kept
        along = (direction * ahead).sum(0)
        going = (size > least) & (along > 0)  # a column that has arrived stays: further on there are only rounding errors
        length = torch.where(going, size / along, 0.0)
        b = b + length * direction
        residual = residual - length * ahead
        before, size = size, torch.where(going, residual.square().sum(0), 0.0)
        direction = residual + torch.where(going, size / before, 0.0) * direction
    return b

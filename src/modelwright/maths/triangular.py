"""A matrix as a product of triangular ones."""

from __future__ import annotations

import torch
from torch import Tensor


def lower_diagonal_upper(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """P L [out, k], z [k] and Ũ [k, in] with W = P L diag(z) Ũ for a weight [out, in], k = min(out, in); float32 or wider.

    By elimination with the largest pivot of each column: L has a diagonal of ones and lies within ±1, P orders its rows, and Ũ is the
    upper triangle with its rows divided by the pivots z. A pivot that is 0 but for rounding counts as 1, its row undivided.
    """
    exact = weight.to(torch.promote_types(weight.dtype, torch.float32))
    packed, swaps, _ = torch.linalg.lu_factor_ex(exact)
    size = min(weight.shape)
    lower = packed[:, :size].tril(-1)
    lower.diagonal().fill_(1)
    upper = packed[:size].triu()
    pivots = upper.diagonal()
    if not weight.is_meta:
        order = list(range(len(weight)))
        for place, other in enumerate((swaps - 1).tolist()):
            order[place], order[other] = order[other], order[place]
        lower = torch.empty_like(lower).index_copy_(0, torch.tensor(order, device=lower.device), lower)
    tiny = torch.finfo(exact.dtype).eps * max(weight.shape) * pivots.abs().amax()
    pivots = torch.where(pivots.abs() > tiny, pivots, 1.0)
    return lower, pivots, upper / pivots[:, None]

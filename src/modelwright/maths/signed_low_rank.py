"""Signs times a product of two thin matrices: W ≈ S ⊙ (A B), with A B the best approximation of |W| of its rank.

Since S² = 1, what is left over is as large as what |W| lacks: ‖W - S ⊙ (A B)‖² = Σ_{j>r} σ_j(|W|)². As terms of `maths.residual` these
are BitStack's blocks (Wang et al. 2024, arXiv:2410.23918, section 3.1, absolute value decomposition).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from modelwright.core.errors import SiteError
from modelwright.maths import bits, low_rank


class Signed(NamedTuple):
    """One such term."""

    signs: Tensor  # uint8 [ceil(out · in / 8)], row after row, 1 for plus and for 0, the first in the highest bit
    left: Tensor  # A [out, rank]
    right: Tensor  # B [rank, in]


def fit(values: Tensor, rank: int, dtype: torch.dtype = torch.float16) -> Signed:
    """The term of values [out, in] whose factors are stored in this dtype; rank: 1 to min(out, in).

    A and B are U √Σ and √Σ Vᵀ of the largest singular values of |W|. Raises SiteError where a factor is too large for the dtype, or a
    value NaN or infinite.
    """
    left, right = (part.to(dtype) for part in low_rank.factor(values.float().abs(), rank))
    if not (left.isfinite().all() and right.isfinite().all()):
        raise SiteError(f"The factors of a weight are too large for {str(dtype).removeprefix('torch.')}. Leave it out with `skip`.")
    return Signed(bits.packed((values >= 0).flatten(), order="big"), left, right)


def decode(term: Signed) -> Tensor:
    """S ⊙ (A B), float32 [out, in]."""
    size = term.left.float() @ term.right.float()
    plus = bits.unpacked(term.signs, size.numel(), order="big").view_as(size)
    return torch.where(plus, size, -size)

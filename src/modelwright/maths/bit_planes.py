"""Odd whole numbers as planes of signs: of n bits b, the number Σ 2^i (2 b_i - 1), the highest plane first.

Every plane is ±1, so that a product of two such numbers is one of signs for each pair of planes, without a plane that counts
otherwise. The first planes alone are the same numbers in fewer bits.

Source: Ma, Fang et al. 2024, arXiv:2409.17870, section 3.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from modelwright.maths.bits import packed, unpacked

ONES = np.array([int(byte).bit_count() for byte in range(256)], np.int64)  # bits that are set


def planes(codes: Tensor, bits: int) -> Tensor:
    """Codes uint8 [out, in] below 2^bits as planes, uint8 [bits, out, ceil(in / 8)]."""
    return torch.stack([packed((codes >> place) & 1 == 1) for place in reversed(range(bits))])


def codes(stored: Tensor, columns: int) -> Tensor:
    """The codes of planes, uint8 [out, columns]."""
    found = torch.zeros(stored.shape[1], columns, dtype=torch.uint8, device=stored.device)
    for plane in stored:
        found = found * 2 + unpacked(plane, columns)
    return found


def numbers(stored: Tensor, columns: int) -> Tensor:
    """The odd numbers 2 · code - (2^bits - 1) of planes, int16 [out, columns]."""
    return 2 * codes(stored, columns).to(torch.int16) - (2 ** len(stored) - 1)


def product(left: Tensor, right: Tensor, columns: int) -> Tensor:
    """The numbers of planes [n, out, bytes] times those of planes [m, rows, bytes]: Σ v · w over the columns, int64 [out, rows].

    Σ 2^(p + q) (columns - 2 · ones(left_p xor right_q)) over all pairs of planes p and q, exact. Spare bits of a last byte are 0 in
    both, and so differ nowhere.
    """
    found = torch.zeros(left.shape[1], right.shape[1], dtype=torch.int64)
    for high, own in enumerate(reversed(left.unbind())):
        for low, other in enumerate(reversed(right.unbind())):
            differ = ONES[(own[:, None] ^ other[None]).numpy()].sum(-1)
            found += (columns - 2 * torch.from_numpy(differ)) << (high + low)
    return found

"""Where the ones of a sparse mask stand, as gaps in Golomb-Rice codes.

Golomb 1966, Run-length encodings, IEEE Transactions on Information Theory 12(3); Rice 1979. Between ones that occur with probability p
the gaps g (zeros between two of them) are geometric. A gap is g >> b zeros and a one, and then the b lower bits of g. All the first
parts stand in one stream of bits and all the second in another, so that both are read by whole arrays; their sum is as long.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from modelwright.core.errors import WeightsError
from modelwright.maths.bits import packed, unpacked

GOLDEN = (5**0.5 - 1) / 2  # φ - 1


def parameter(share: float) -> int:
    """The best number b of lower bits where a `share` of the entries are ones: 1 + floor(log2(ln(φ - 1) / ln(1 - share))), at least 0.

    Kiely 2004, Selecting the Golomb parameter in Rice coding, IPN progress report 42-159, as in ComPEFT, section 2.2.
    """
    if not 0 < share < 1:
        return 0
    return max(0, 1 + math.floor(math.log2(math.log(GOLDEN) / math.log1p(-share))))


def bits_of_one(share: float) -> float:
    """The bits that the gap before a one takes on average: b + 1 / (1 - (1 - share)^(2^b))."""
    b = parameter(share)
    return b + 1 / (1 - (1 - share) ** (1 << b))


def encode(places: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """Rising places of ones, int64 [m] from 0 -> the bits g >> b zeros and a one, and the b lower bits of each gap, uint8 [bytes] both."""
    gaps = torch.diff(places, prepend=places.new_tensor([-1])) - 1
    ends = ((gaps >> b) + 1).cumsum(0) - 1
    ones = torch.zeros(int(ends[-1]) + 1 if len(ends) else 0, dtype=torch.bool)
    ones[ends] = True
    lower = (gaps.unsqueeze(1) >> torch.arange(b)) & 1
    return packed(ones), packed(lower.bool().view(-1))


def decode(ones: Tensor, lower: Tensor, b: int, count: int) -> Tensor:
    """The places of `count` ones, int64 [count].

    Raises WeightsError when the streams hold another number.
    """
    ends = unpacked(ones, 8 * len(ones)).nonzero().view(-1)
    if len(ends) != count or len(lower) != -(-count * b // 8):
        found = f"{count:,} changes were asked for, and the places of {len(ends):,} are stored"
        raise WeightsError(f"{found}. The file is damaged; fetch it again.")
    upper = torch.diff(ends, prepend=ends.new_tensor([-1])) - 1
    bits = unpacked(lower, count * b).view(count, b).long() << torch.arange(b)
    return ((upper << b) + bits.sum(1) + 1).cumsum(0) - 1

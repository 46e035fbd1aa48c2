"""Floats without loss in fewer bytes: the exponents of trained weights take few of the values that they could, the rest is as if random.

Zhang et al. 2025, arXiv:2504.11651 (DFloat11). A bfloat16 splits into 8 bits of exponent, which are coded (`prefix_codes`), and 8 of
sign and mantissa, which stay; a float32 into 8 and 24, a float16 into 5 and 11. Bit patterns come back as they were: -0, NaN, denormals.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from modelwright.maths import prefix_codes
from modelwright.maths.bits import packed, unpacked
from modelwright.maths.prefix_codes import BLOCK, Coded, Reader
from modelwright.maths.slices import each


class Split(NamedTuple):
    """How the bits of a dtype divide."""

    exponent: int  # bits that are coded
    upper: int  # of the mantissa's bits, those that stay with the sign
    whole: torch.dtype  # whole numbers of its width
    rest: torch.dtype | None  # whole numbers of the width of the mantissa's other bits; None where there are none

    @property
    def below(self) -> int:
        """The mantissa's lower bits."""
        return 8 * self.rest.itemsize if self.rest else 0


SPLITS = {
    torch.bfloat16: Split(8, 7, torch.int16, None),
    torch.float16: Split(5, 2, torch.int16, torch.uint8),
    torch.float32: Split(8, 7, torch.int32, torch.int16),
}
PARTS = ("codes", "bits", "lengths", "signs", "rest")


class CodedFloats(NamedTuple):
    """The parts of a coded tensor of n values."""

    codes: Tensor  # of the exponents, as in `prefix_codes.Coded`, like the next two
    bits: Tensor
    lengths: Tensor  # uint8 [2^exponent bits]
    signs: Tensor  # s ‖ m, the sign and the mantissa's upper bits: uint8 [n]; of float16 their 3 bits as planes, uint8 [3, ceil(n / 8)]
    rest: Tensor | None  # the mantissa's lower bits: int16 [n] of float32, uint8 [n] of float16

    @property
    def nbytes(self) -> int:
        """The bytes of all parts."""
        return sum(part.nbytes for part in self if part is not None)


def encode(values: Tensor) -> CodedFloats:
    """Code a tensor of a dtype in `SPLITS`, any shape; its entries in their order."""
    split = SPLITS[values.dtype]
    flat = values.detach().cpu().contiguous().view(-1).view(split.whole)
    exponents, signs = (torch.empty(len(flat), dtype=torch.uint8) for _ in range(2))
    rest = None if split.rest is None else torch.empty(len(flat), dtype=split.rest)
    counts = torch.zeros(1 << split.exponent, dtype=torch.int64)

    def part(at: slice) -> Tensor:
        some = flat[at]
        upper = some >> split.below
        exponents[at] = (upper >> split.upper) & ((1 << split.exponent) - 1)
        signs[at] = ((upper >> split.exponent) & (1 << split.upper)) | (upper & ((1 << split.upper) - 1))
        if rest is not None:
            rest[at] = some.to(rest.dtype)  # keeps the lowest bits
        return torch.bincount(exponents[at], minlength=len(counts))

    for found in each(part, len(flat)):
        counts += found
    coded = prefix_codes.encode(exponents, prefix_codes.code_lengths(counts))
    return CodedFloats(*coded, _planes(signs, split), rest)


def decode(coded: CodedFloats, dtype: torch.dtype, count: int, blocks: Sequence[int] | None = None) -> Tensor:
    """The `count` values [count] of this dtype, on the parts' device; with `blocks`, by rising number, those of these blocks alone.

    Raises WeightsError when the parts are damaged.
    """
    split, every = SPLITS[dtype], blocks is None
    blocks = range(-(-count // BLOCK)) if blocks is None else blocks
    size = count if every else sum(min(BLOCK, count - block * BLOCK) for block in blocks)
    out = torch.empty(size, dtype=split.whole, device=coded.codes.device)

    def chosen(part: Tensor, width: int = BLOCK) -> Tensor:
        return part if every else torch.cat([part[..., :0], *(part[..., block * width : (block + 1) * width] for block in blocks)], -1)

    signs = chosen(coded.signs) if split.upper == 7 else _bytes(chosen(coded.signs, BLOCK // 8), size)
    rest = None if coded.rest is None else chosen(coded.rest)
    Reader(Coded(*coded[:3]), count).read(blocks, out, signs, rest, (split.exponent, split.upper))
    return out.view(dtype)


def least_bytes(values: Tensor) -> float:
    """The bytes under which no code of single exponents of a tensor gets: n (16 - 8 + H) / 8 of a bfloat16, H their entropy in bits."""
    split = SPLITS[values.dtype]
    flat = values.detach().cpu().contiguous().view(-1).view(split.whole)

    def part(at: slice) -> Tensor:
        exponents = (flat[at] >> (split.below + split.upper)) & ((1 << split.exponent) - 1)
        return torch.bincount(exponents, minlength=1 << split.exponent)

    counts = sum(each(part, len(flat)), torch.zeros(1 << split.exponent, dtype=torch.int64))
    return len(flat) * (8 * values.dtype.itemsize - split.exponent + prefix_codes.entropy(counts)) / 8 if len(flat) else 0.0


def _planes(signs: Tensor, split: Split) -> Tensor:
    """Bytes of s ‖ m as they are stored: as planes of a bit each where a byte has bits to spare."""
    if split.upper == 7:
        return signs
    return torch.stack([packed((signs >> bit & 1).bool()) for bit in range(split.upper + 1)])


def _bytes(planes: Tensor, count: int) -> Tensor:
    """`_planes` read back, uint8 [count]."""
    found = planes.new_zeros(count)
    for bit, plane in enumerate(planes):
        found |= unpacked(plane, count).to(torch.uint8) << bit
    return found

"""The loops of `packed_products`, compiled."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from modelwright.maths._compiled import compiled

FOUR, LOW, HALVES = np.uint8(4), np.uint8(15), np.uint32(16)
LOOSE = {"reassoc", "contract", "nsz"}  # sums in any order, so that the processor takes many terms at once; NaN stays NaN


@partial(compiled, fastmath=LOOSE)
def real(scale: Any, row: Any, group: Any) -> Any:
    """An entry of scales as float32; unsigned numbers of 16 bits are the upper halves of one."""
    if scale.itemsize == 2:
        return np.uint32(np.uint32(scale[row, group]) << HALVES).view(np.float32)
    return np.float32(scale[row, group])


@partial(compiled, fastmath=LOOSE)
def shift(zero: Any, bits: Any, row: Any, group: Any) -> Any:
    """What is taken from each unsigned code of a group: its zero point, one of floats [out, groups] or in the bytes of packed words."""
    if zero is None:
        return np.float32(1 << (bits - 1))
    if zero.itemsize == 1:
        place = row * bits % 32
        return np.float32((np.int64(zero[row * bits // 32, 4 * group + place // 8]) >> (place % 8)) & ((1 << bits) - 1))
    return np.float32(1 << (bits - 1)) + real(zero, row, group)


@partial(compiled, fastmath=LOOSE)
def nibbles(packed: Any, scale: Any, zero: Any, x: Any, sums: Any, out: Any, first: Any, last: Any) -> Any:
    """Rows `first` to `last` of codes of 4 bits, times x float32 [count, 2, in / 2], the even columns and the odd ones, into out."""
    groups = scale.shape[1]
    size = x.shape[2] // groups
    for row in range(first, last):
        for one in range(len(x)):
            total = np.float32(0)
            for group in range(groups):
                part = slice(group * size, (group + 1) * size)
                codes, even, odd = packed[row, part], x[one, 0, part], x[one, 1, part]
                found = np.float32(0)
                for place in range(size):
                    code = codes[place]  # stays a byte as long as it can, of which the processor takes most at once
                    found += even[place] * np.float32(np.uint8(code & LOW)) + odd[place] * np.float32(np.uint8(code >> FOUR))
                total += real(scale, row, group) * (found - shift(zero, 4, row, group) * sums[one, group])
            out[one, row] = total


@partial(compiled, fastmath=LOOSE)
def levels(packed: Any, scale: Any, table: Any, x: Any, out: Any, first: Any, last: Any) -> Any:
    """The same where a code is a place in a table of 16 levels."""
    groups = scale.shape[1]
    size = x.shape[2] // groups
    for row in range(first, last):
        for one in range(len(x)):
            total = np.float32(0)
            for group in range(groups):
                part = slice(group * size, (group + 1) * size)
                codes, even, odd = packed[row, part], x[one, 0, part], x[one, 1, part]
                found = np.float32(0)
                for place in range(size):
                    code = codes[place]
                    found += even[place] * table[code & LOW] + odd[place] * table[code >> FOUR]
                total += real(scale, row, group) * found
            out[one, row] = total


@partial(compiled, fastmath=LOOSE)
def bytewise(packed: Any, scale: Any, zero: Any, x: Any, sums: Any, out: Any, first: Any, last: Any) -> Any:
    """The same for codes of 8 bits, with x [count, 1, in]."""
    groups = scale.shape[1]
    size = x.shape[2] // groups
    for row in range(first, last):
        for one in range(len(x)):
            total = np.float32(0)
            for group in range(groups):
                part = slice(group * size, (group + 1) * size)
                codes, inputs = packed[row, part], x[one, 0, part]
                found = np.float32(0)
                for place in range(size):
                    found += inputs[place] * np.float32(codes[place])
                total += real(scale, row, group) * (found - shift(zero, 8, row, group) * sums[one, group])
            out[one, row] = total

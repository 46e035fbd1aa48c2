"""The loops of `rounding`, compiled: each reads and writes a matrix once."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from modelwright.maths._compiled import compiled

HALVES = np.uint32(16)


@compiled
def bounds(numbers: Any, size: Any, low: Any, high: Any) -> Any:
    """The least and the greatest float of each group, all of them as whole numbers of their bits.

    numbers [rows, in], low and high [rows, groups]. size: a mask of the bits beside the sign. With these turned over in negative ones,
    floats are in the order of the whole numbers, NaN at both ends.
    """
    groups = low.shape[1]
    kind = numbers.dtype.type  # to which what is computed is brought back, so that the processor takes many at once
    width, sign = numbers.shape[1] // groups, kind(8 * numbers.itemsize - 1)
    for row in range(len(numbers)):
        for group in range(groups):
            part = numbers[row, group * width : (group + 1) * width]
            least = most = kind(part[0] ^ ((part[0] >> sign) & size))
            for place in range(width):
                key = kind(part[place] ^ ((part[place] >> sign) & size))
                least = min(least, key)
                most = max(most, key)
            low[row, group] = least ^ ((least >> sign) & size)
            high[row, group] = most ^ ((most >> sign) & size)


@partial(compiled, error_model="numpy")
def nearest(values: Any, scale: Any, before: Any, after: Any, least: Any, most: Any, codes: Any) -> Any:
    """Codes int8 [rows, in]: round(value / scale + before) + after, at least `least` and at most `most`.

    values: float32, or the upper halves of floats as whole numbers of 16 bits. The others float32 [rows, groups].
    """
    groups = scale.shape[1]
    width = values.shape[1] // groups
    for row in range(len(codes)):
        for group in range(groups):
            part, out = values[row, group * width : (group + 1) * width], codes[row, group * width : (group + 1) * width]
            step, shift, zero = scale[row, group], before[row, group], after[row, group]
            low, high = least - zero, most - zero
            for place in range(width):
                value = part[place]
                real = np.uint32(np.uint32(value) << HALVES).view(np.float32) if values.itemsize == 2 else np.float32(value)
                near = np.rint(min(max(real / step + shift, low), high))  # the bounds are whole, so that rounding may come last
                out[place] = np.int8(near + zero)


@compiled
def nibbles(codes: Any, out: Any) -> Any:
    """Two signed codes of 4 bits in a byte, the first one low: codes uint8 [rows, 2 n], out uint8 [rows, n or more]."""
    for row in range(len(codes)):
        own, stream = codes[row], out[row]
        for place in range(len(own) // 2):
            stream[place] = ((own[2 * place] & np.uint8(15)) | (own[2 * place + 1] << np.uint8(4))) ^ np.uint8(0x88)  # + 8, in 4 bits


@compiled
def streams(bits: Any, codes: Any, out: Any) -> Any:
    """Eight codes in as many bytes as a code has bits: codes uint8 [rows, 8 n], out uint8 [rows, bits · n or more]."""
    most, half = np.uint64((1 << bits) - 1), np.uint64(1 << (bits - 1))
    for row in range(len(codes)):
        own, stream = codes[row], out[row]
        for unit in range(len(own) // 8):
            word = np.uint64(0)
            for place in range(8):
                word |= ((np.uint64(own[8 * unit + place]) & most) ^ half) << np.uint64(place * bits)
            for place in range(bits):
                stream[unit * bits + place] = np.uint8(word >> np.uint64(8 * place))

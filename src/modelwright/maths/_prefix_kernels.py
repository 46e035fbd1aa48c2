"""The loops of `prefix_codes`, compiled by numba; they run beside each other, without Python's lock."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import njit

LONGEST, LANES, STEPS = 12, 64, 1 << 10  # those of `prefix_codes`, which compiled code takes as constants
BLOCK = LANES * STEPS
MASK = np.uint64((1 << LONGEST) - 1)


def compiled(function: Callable[..., Any]) -> Any:
    """The function compiled, and kept on disk for the next process where there is a place for it."""
    try:
        return njit(nogil=True, cache=True)(function)
    except RuntimeError:  # neither the package's folder nor the user's can be written
        return njit(nogil=True)(function)


@compiled
def measure(symbols, lengths, bits, first, last):  # type: ignore[no-untyped-def]
    """The bits of each lane of blocks `first` to `last` (not included), into `bits`."""
    for block in range(first, last):
        base = block * BLOCK
        count = min(BLOCK, len(symbols) - base)
        lanes = min(LANES, (count + STEPS - 1) // STEPS)
        for lane in range(lanes):
            total = 0
            for place in range(base + lane, base + count, lanes):
                total += lengths[symbols[place]]
            bits[block * LANES + lane] = total


@compiled
def write(symbols, codes, lengths, starts, words, first, last):  # type: ignore[no-untyped-def]
    """The codes of blocks `first` to `last`, lane after lane, into the words from each block's start on."""
    for block in range(first, last):
        base = block * BLOCK
        count = min(BLOCK, len(symbols) - base)
        lanes = min(LANES, (count + STEPS - 1) // STEPS)
        word, held, used = starts[block * LANES] >> 6, np.uint64(0), np.int64(0)
        for lane in range(lanes):
            for place in range(base + lane, base + count, lanes):
                symbol = symbols[place]
                code, length = np.uint64(codes[symbol]), np.int64(lengths[symbol])
                held |= code << np.uint64(used)
                used += length
                if used >= 64:
                    words[word] = held
                    word += 1
                    used -= 64
                    held = code >> np.uint64(length - used) if used else np.uint64(0)
        if used:
            words[word] = held


@compiled
def read(words, starts, bits, table, count, blocks, first, last, signs, rest, exponent, mantissa, out):  # type: ignore[no-untyped-def]
    """Decode the `first` to `last` of `blocks` into their places of `out`; returns how many lanes ended elsewhere than they should.

    All numbers are unsigned, so that no index is looked at for its sign; none reads outside of the words, whatever they say.
    """
    places = np.empty(LANES, np.uint64)
    one, four, six, low = np.uint64(1), np.uint64(4), np.uint64(6), np.uint64(63)
    spare = np.uint64(len(words) - 2)
    up, upper = np.uint64(mantissa), np.uint64((1 << mantissa) - 1)
    top, over = np.uint64(1 << mantissa), np.uint64(exponent)
    width = np.uint64(0) if rest is None else np.uint64(8 * rest.itemsize)
    wrong = 0
    for number in range(first, last):
        block = blocks[number]
        size = min(BLOCK, count - block * BLOCK)
        lanes = np.uint64(min(LANES, (size + STEPS - 1) // STEPS))
        for lane in range(lanes):
            places[lane] = starts[block * LANES + lane]
        base, end = np.uint64(number * BLOCK), np.uint64(number * BLOCK + size)
        at = base
        while at < end:
            steps = min(four, max(one, (end - at) // lanes))  # with four, all lanes have so many left
            for lane in range(min(lanes, end - at)):
                place = places[lane]
                word = min(place >> six, spare)
                window = (words[word] >> (place & low)) | ((words[word + one] << one) << (low - (place & low)))
                to = at + lane
                for _ in range(steps):
                    entry = np.uint64(table[window & MASK])
                    symbol, length = entry & np.uint64(255), entry >> np.uint64(8)
                    window >>= length
                    place += length
                    if signs is not None:
                        sign = np.uint64(signs[to])
                        symbol = (symbol << up) | ((sign & top) << over) | (sign & upper)
                        if rest is not None:
                            symbol = (symbol << width) | np.uint64(rest[to])
                    out[to] = symbol
                    to += lanes
                places[lane] = place
            at += steps * lanes
        for lane in range(lanes):
            wrong += places[lane] != np.uint64(starts[block * LANES + lane] + bits[block * LANES + lane])
    return wrong

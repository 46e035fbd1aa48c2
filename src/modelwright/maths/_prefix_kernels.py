"""The loops of `prefix_codes`, compiled."""

from __future__ import annotations

from typing import Any

import numpy as np

from modelwright.maths._compiled import compiled

LONGEST, LANES, STEPS = 12, 64, 1 << 10  # those of `prefix_codes`, which compiled code takes as constants
BLOCK = LANES * STEPS
MASK, BYTE, EIGHT = np.uint64((1 << LONGEST) - 1), np.uint64(255), np.uint64(8)
FOUR = np.uint64(4)  # codes that a window of 64 bits holds, whatever their lengths


@compiled
def measure(symbols: Any, lengths: Any, bits: Any, first: Any, last: Any) -> Any:
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
def write(symbols: Any, codes: Any, lengths: Any, starts: Any, words: Any, first: Any, last: Any) -> Any:
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
def value(symbol: Any, signs: Any, rest: Any, exponent: Any, mantissa: Any, at: Any) -> Any:
    """`prefix_codes.merged` for the entry at one place; the symbol itself without `signs`."""
    if signs is None:
        return symbol
    upper, sign = np.uint64(mantissa), np.uint64(signs[at])
    found = (symbol << upper) | ((sign >> upper) << (upper + np.uint64(exponent))) | (sign & ((np.uint64(1) << upper) - np.uint64(1)))
    if rest is None:
        return found
    return (found << np.uint64(8 * rest.itemsize)) | np.uint64(rest[at])


@compiled
def read(
    words: Any, starts: Any, bits: Any, table: Any, count: Any, blocks: Any, first: Any, last: Any,
    signs: Any, rest: Any, exponent: Any, mantissa: Any, out: Any,
) -> Any:  # fmt: skip
    """Decode the `first` to `last` of `blocks` into their places of `out`; returns how many lanes ended elsewhere than they should.

    All numbers are unsigned, so that no index is looked at for its sign; none reads outside of the words, whatever they say.
    """
    places = np.empty(LANES, np.uint64)
    one, six, low = np.uint64(1), np.uint64(6), np.uint64(63)
    spare = np.uint64(len(words) - 2)
    wrong = 0
    for number in range(first, last):
        block = blocks[number]
        size = min(BLOCK, count - block * BLOCK)
        lanes = np.uint64(min(LANES, (size + STEPS - 1) // STEPS))
        for lane in range(lanes):
            places[lane] = starts[block * LANES + lane]
        at, end = np.uint64(number * BLOCK), np.uint64(number * BLOCK + size)
        while at + FOUR * lanes <= end:
            for lane in range(lanes):
                place = places[lane]
                word = min(place >> six, spare)
                window = (words[word] >> (place & low)) | ((words[word + one] << one) << (low - (place & low)))
                to = at + lane
                for _ in range(4):  # unrolled
                    entry = np.uint64(table[window & MASK])
                    out[to] = value(entry & BYTE, signs, rest, exponent, mantissa, to)
                    window >>= entry >> EIGHT
                    place += entry >> EIGHT
                    to += lanes
                places[lane] = place
            at += FOUR * lanes
        while at < end:
            for lane in range(min(lanes, end - at)):
                place = places[lane]
                word = min(place >> six, spare)
                window = (words[word] >> (place & low)) | ((words[word + one] << one) << (low - (place & low)))
                entry = np.uint64(table[window & MASK])
                out[at + lane] = value(entry & BYTE, signs, rest, exponent, mantissa, at + lane)
                places[lane] = place + (entry >> EIGHT)
            at += lanes
        for lane in range(lanes):
            wrong += places[lane] != np.uint64(starts[block * LANES + lane] + bits[block * LANES + lane])
    return wrong

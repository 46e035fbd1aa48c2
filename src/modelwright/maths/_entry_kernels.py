"""The loops over the entries of tensors, compiled: each reads its tensors once and writes once.

A tensor in bfloat16 comes as the upper halves of float32 numbers, as whole numbers of 16 bits [entries].
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from modelwright.maths._compiled import compiled

RUN = 1024  # entries worked on at a time, so that they stay in the nearest cache
HALF = np.uint32(16)
NAN = np.uint16(0x7FC0)


@compiled
def _wide(half: Any) -> Any:
    return np.uint32(np.uint32(half) << HALF).view(np.float32)


@compiled
def weighted(tensors: Any, shares: Any, out: Any) -> None:
    """Σ shares[i] · tensors[i] in their order. shares float32 [n], out float32 [entries]."""
    for first in range(0, len(out), RUN):
        total = out[first : first + RUN]
        total[:] = 0
        for number in range(len(tensors)):
            part, share = tensors[number][first : first + RUN], shares[number]
            for place in range(len(total)):
                total[place] += _wide(part[place]) * share


@compiled
def moved(base: Any, tensors: Any, shares: Any, out: Any) -> None:
    """base + Σ shares[i] · (tensors[i] - base). shares float32 [n], out float32 [entries]."""
    for first in range(0, len(out), RUN):
        total, start = out[first : first + RUN], base[first : first + RUN]
        total[:] = 0
        for number in range(len(tensors)):
            part, share = tensors[number][first : first + RUN], shares[number]
            for place in range(len(total)):
                total[place] += (_wide(part[place]) - _wide(start[place])) * share
        for place in range(len(total)):
            total[place] += _wide(start[place])


@partial(compiled, fastmath={"reassoc", "contract"})
def _dot(left: Any, right: Any) -> Any:
    total = np.float32(0)
    for place in range(len(left)):
        total += left[place] * right[place]
    return total


@compiled
def products(tensors: Any, base: Any, gram: Any) -> None:
    """Adds to gram, float64 [n, n], the dot products of tensors[i] - base, or of tensors[i] where base has no entries."""
    count = len(tensors)
    values = np.empty((count, RUN), np.float32)
    for first in range(0, len(tensors[0]), RUN):
        size = min(RUN, len(tensors[0]) - first)
        for number in range(count):
            row, part, start = values[number, :size], tensors[number][first : first + size], base[first : first + size]
            for place in range(size):
                row[place] = _wide(part[place]) - (_wide(start[place]) if len(base) else np.float32(0))
        for number in range(count):
            for other in range(number + 1):
                found = np.float64(_dot(values[number, :size], values[other, :size]))
                gram[number, other] += found
                if other != number:
                    gram[other, number] += found


SMALL = np.float32(0.25)  # changes up to which the series below is exact in float32; beyond, e^x - 1 - x is


@partial(compiled, fastmath={"reassoc", "contract"})
def divergences(before: Any, after: Any, shares: Any, out: Any) -> None:
    """KL of the softmax of each row, after from before, by the softmax of the one before: as `arcee_fusion.divergence` says.

    before, after [rows, width]. shares: float32 [rows, width], softmax(before). out float32 [rows].
    """
    width = before.shape[1]
    change = np.empty(width, np.float32)
    for row in range(len(before)):
        old, new, share = before[row], after[row], shares[row]
        mean = np.float32(0)
        for place in range(width):
            change[place] = _wide(new[place]) - _wide(old[place])
            mean += change[place] * share[place]
        largest = np.float32(0)
        for place in range(width):
            change[place] -= mean
            largest = max(largest, abs(change[place]))
        if largest <= SMALL:
            more, found = np.float32(0), np.float32(0)
            for place in range(width):
                x = change[place]
                series = np.float32(1 / 720) + x * np.float32(1 / 5040)
                series = np.float32(1 / 24) + x * (np.float32(1 / 120) + x * series)
                rest = x * x * (np.float32(1 / 2) + x * (np.float32(1 / 6) + x * series))
                more += rest * share[place]
                found += x * (x + rest) * share[place]
            out[row] = found / (np.float32(1) + more) - np.log1p(more)
        else:
            beyond, spread = 0.0, 0.0
            for place in range(width):
                wide = np.float64(change[place])
                over = np.expm1(wide) - wide
                beyond += over * share[place]
                spread += wide * (wide + over) * share[place]
            out[row] = spread / (1 + beyond) - np.log1p(beyond)


@compiled
def sizes(before: Any, after: Any, factors: Any, width: Any, first: Any, out: Any) -> None:
    """|after - before| · factors[row] of entries [n], the first of which is entry `first` of a matrix with rows of this width.

    factors float32 [rows], out float32 [n].
    """
    done = 0
    while done < len(out):
        row = (first + done) // width
        stop, factor = min(len(out), (row + 1) * width - first), factors[row]
        old, new, found = before[done:stop], after[done:stop], out[done:stop]
        for place in range(len(found)):
            found[place] = abs(_wide(new[place]) - _wide(old[place])) * factor
        done = stop


@compiled
def chosen(scores: Any, least: Any, before: Any, after: Any, out: Any) -> None:
    """Of entries [n] those after where the score reaches the least, and those before where it does not; NaN where it is NaN."""
    for place in range(len(out)):
        other = before[place] if scores[place] < least else NAN
        out[place] = after[place] if scores[place] >= least else other


@compiled
def look(values: Any, low: Any, high: Any) -> Any:
    """How many of values [n] are not at or above `low`, and those from `low` to `high`."""
    reach, beyond = 0, 0
    for place in range(len(values)):
        reach += values[place] >= low
        beyond += values[place] > high
    inside, count = np.empty(reach - beyond + 1, values.dtype), 0  # room for the last one that is not
    for place in range(len(values)):
        inside[count] = values[place]
        count += (values[place] >= low) & (values[place] <= high)
    return len(values) - reach, inside[:count]

"""Which entries are the lowest: boolean masks with exact counts.

Everywhere `True` means remove. Of entries that tie at the cut, those that stand first are removed, so that the count
is exact and the same scores give the same mask on every device.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from modelwright.core.errors import SiteError
from modelwright.maths._kernels import kernels
from modelwright.maths.slices import Sliced, Values, each, flat, in_order, slices

SAMPLE = 1 << 16  # entries that tell about where a cut lies, at least
RUN = 1 << 9  # of which so many lie beside each other
BUFFER = 1 << 20  # values that are collected in one tensor
SPREAD = 10.0  # width of a bracket, in standard deviations of a fair sample; where it misses, a wider one is tried


class Cut(NamedTuple):
    """Where a sorted list is cut: all entries below `value` come before, and the first ones of those equal to it.

    Those that come before are all in the slices before `last`, and the first `ties` in the slice that starts there. So it
    marks the slices of `slices` alone, not others.
    """

    value: float
    last: int = 0
    ties: int = 0

    def mark(self, part: Tensor, at: slice) -> Tensor:
        """Mark what of a slice's values lies before the cut."""
        assert in_order(at), at
        if at.start < self.last:
            return part <= self.value
        mask = part < self.value
        if at.start == self.last and self.ties:
            mask[(part == self.value).nonzero()[: self.ties, 0]] = True
        return mask

    def before(self, part: Tensor, at: slice) -> Tensor:
        """The same as 1 and 0 in the place of the values; to multiply with it is faster than to fill by a mask."""
        assert in_order(at), at
        if at.start == self.last:
            return part.copy_(self.mark(part, at))
        return part.le_(self.value) if at.start < self.last else part.lt_(self.value)


def part_of(share: float, count: int) -> int:
    """floor(share · count), of the share as it is written: 0.29 of 100 are 29, though the product of floats is less."""
    return math.floor(share * count + 1e-9)


def lowest(score: Tensor, sparsity: float = 0.0, *, per: str = "tensor", pattern: tuple[int, int] | None = None) -> Tensor:
    """Mark the lowest scores.

    score: [out, in], of any real dtype, without NaN.
    sparsity: the fraction to mark; exactly floor(sparsity · n) of the n entries that compete.
    per: "tensor", all entries compete; "row", each row's own.
    pattern: (n, m) keeps n of every m consecutive entries of a row, marks the m - n lowest, and overrides the others.

    Returns a boolean mask like `score`, True = remove.
    """
    if pattern:
        return _lowest_of_runs(score, *pattern)
    if per == "row":
        return _lowest_of_rows(score, part_of(sparsity, score.shape[-1]))
    assert per == "tensor", per
    values = flat(score)
    cut = find_cut(values, score.numel(), part_of(sparsity, score.numel()))
    return Sliced(score.shape, torch.bool, lambda at: cut.mark(values(at), at)).whole(score.new_empty(score.shape, dtype=torch.bool))


def find_cut(values: Values, count: int, lowest: int) -> Cut:
    """Find where the `lowest` lowest of `count` values end, without a copy of them all."""
    return find_cuts(values, count, [lowest])[0]


def find_cuts(values: Values, count: int, lowest: Sequence[int]) -> list[Cut]:
    """Find where the lowest of `count` values end, for several numbers of them, without a copy of them all.

    A sample brackets the cuts, and one pass counts what lies below each bracket and collects what lies inside: O(count).
    """
    found = {rank: Cut(float("-inf")) for rank in lowest if rank <= 0}
    sample, spread = _sample(values, count), SPREAD
    while missing := [rank for rank in dict.fromkeys(lowest) if rank not in found]:
        brackets = _joined(_bracket(sample, rank / count, spread) for rank in missing)
        found |= _cuts_within(values, count, brackets, missing)
        spread *= 8
    return [found[rank] for rank in lowest]


def quantiles(values: Values, count: int, shares: Sequence[float]) -> list[float]:
    """The values below which those shares of `count` values lie, each on a straight line between its two neighbours."""
    spots = [share * (count - 1) for share in shares]
    ranks = [min(int(spot) + after, count) for after in (1, 2) for spot in spots]
    ends = [cut.value for cut in find_cuts(values, count, ranks)]
    pairs = zip(spots, ends[: len(spots)], ends[len(spots) :], strict=True)
    return [below + (spot - int(spot)) * (above - below) if spot > int(spot) else below for spot, below, above in pairs]


def _cuts_within(values: Values, count: int, brackets: list[tuple[float, float]], ranks: Sequence[int]) -> dict[int, Cut]:
    """Those of the cuts that lie within brackets, by rank."""

    def look(at: slice) -> list[tuple[int, int, int, Tensor]]:
        part = values(at)
        return [_look(part, low, high) for low, high in brackets]

    stretches = [_Stretch(low, high) for low, high in brackets]
    for seen in each(look, count):
        for stretch, one in zip(stretches, seen, strict=True):
            stretch.add(*one)
    found: dict[int, Cut] = {}
    for stretch in stretches:
        found |= stretch.cuts(ranks, count)
    if len(found) < len(ranks) and brackets == [(float("-inf"), float("inf"))]:
        raise SiteError("Some values are NaN, so they have no order. Look for NaN in the models.")
    return found


class _Stretch:
    """What is known of the values between two ends, slice by slice.

    They are copied to large buffers: small ones that stay would keep what comes and goes between them from its places.
    """

    def __init__(self, low: float, high: float):
        self.low, self.high, self.below = low, high, 0
        self.at_low: list[int] = []
        self.at_high: list[int] = []
        self.lengths: list[int] = []
        self.buffers: list[Tensor] = []
        self.room = 0  # in the last buffer

    def add(self, below: int, at_low: int, at_high: int, inside: Tensor) -> None:
        """Take in what `_look` found in the next slice."""
        self.below += below
        self.at_low.append(at_low)
        self.at_high.append(at_high)
        self.lengths.append(len(inside))
        while len(inside):
            if not self.room:
                self.buffers.append(inside.new_empty(BUFFER))
                self.room = BUFFER
            start = BUFFER - self.room
            fits = min(len(inside), self.room)
            self.buffers[-1][start : start + fits] = inside[:fits]
            self.room -= fits
            inside = inside[fits:]

    def cuts(self, lowest: Iterable[int], count: int) -> dict[int, Cut]:
        """Where the lowest of all `count` values end, for those numbers of them that end within this stretch."""
        low, inside, high = sum(self.at_low), sum(self.lengths), sum(self.at_high)
        ranks = {rank: rank - self.below for rank in lowest if 0 < rank - self.below <= low + inside + high}
        found = {rank: _cut_at(self.low, place, self.at_low, count) for rank, place in ranks.items() if place <= low}
        found |= {
            rank: _cut_at(self.high, over, self.at_high, count) for rank, place in ranks.items() if (over := place - low - inside) > 0
        }
        within = {rank: place - low for rank, place in ranks.items() if rank not in found}
        if within:
            filled = [*self.buffers[:-1], self.buffers[-1][: BUFFER - self.room]]
            values = (torch.cat(filled) if len(filled) > 1 else filled[0]).numpy()  # slice after slice
            ordered = np.partition(values, sorted({place - 1 for place in within.values()}))
            for rank, place in within.items():
                value = ordered[place - 1]
                slice_of = np.searchsorted(np.cumsum(self.lengths), np.flatnonzero(values == value), side="right")
                equals = np.bincount(slice_of, minlength=len(self.lengths)).tolist()
                found[rank] = _cut_at(float(value), place - int(np.count_nonzero(values < value)), equals, count)
        return found


def _look(part: Tensor, low: float, high: float) -> tuple[int, int, int, Tensor]:
    """Of a slice's values: how many lie below a bracket, on its lower and its upper end, and those that lie inside.

    By numpy, which compares and finds several times as fast as torch on a processor, and has no 16-bit numbers of ours.
    """
    values = _numbers(part)
    if loops := kernels("_entry_kernels"):
        below, values = loops.look(values, values.dtype.type(low), values.dtype.type(high))
    else:
        reaches = values >= low
        below = values.size - int(np.count_nonzero(reaches))
        values = values[np.flatnonzero(reaches & (values <= high))]
    inside = values[(values > low) & (values < high)]
    return below, int(np.count_nonzero(values == low)), int(np.count_nonzero(values == high)), torch.from_numpy(inside)


def _numbers(part: Tensor) -> Any:
    """Values as numpy's."""
    return (part if part.dtype in (torch.float32, torch.float64) else part.double()).cpu().numpy()


def _cut_at(value: float, ties: int, equals: Sequence[int], count: int) -> Cut:
    """The cut at `value` before which `ties` come of the entries that equal it, `equals` of them in each slice."""
    for at, equal in zip(slices(count), equals, strict=True):
        if ties <= equal:
            return Cut(value, at.start, ties)
        ties -= equal
    raise AssertionError(f"{ties} more ties than entries that equal {value}")


def _sample(values: Values, count: int) -> Any:
    """Some of the values, the more the more there are, in runs from all over, sorted; none when the whole is small."""
    size = max(SAMPLE, min(count >> 9, 64 * SAMPLE))
    if count <= size:
        return np.empty(0)
    random = torch.Generator().manual_seed(0)
    starts = torch.randint(count - RUN, (size // RUN,), generator=random).tolist()
    return np.sort(_numbers(torch.cat([values(slice(start, start + RUN)) for start in starts])))


def _bracket(sample: Any, fraction: float, spread: float) -> tuple[float, float]:
    """Two values between which the given quantile very likely lies, by a sorted sample; everything when there is none."""
    middle, width = len(sample) * fraction, spread * ((len(sample) * fraction * (1 - fraction)) ** 0.5 + 1)
    low = float(sample[int(middle - width)]) if middle >= width else float("-inf")
    high = float(sample[int(middle + width)]) if middle + width < len(sample) else float("inf")
    return low, high


def _joined(brackets: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """The same stretches without overlaps, in order."""
    joined: list[tuple[float, float]] = []
    for low, high in sorted(brackets):
        if joined and low <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(high, joined[-1][1]))
        else:
            joined.append((low, high))
    return joined


def _lowest_of_rows(score: Tensor, count: int) -> Tensor:
    if count == 0:
        return torch.zeros_like(score, dtype=torch.bool)
    cut = score.kthvalue(count, dim=-1, keepdim=True).values
    mask = score <= cut
    surplus = mask.sum(-1, keepdim=True) - count
    if surplus.any():
        ties = score == cut
        kept = ties.sum(-1, keepdim=True) - surplus
        mask &= ~ties | (ties.cumsum(-1) <= kept)
    return mask


def lowest_of_each(runs: Tensor, keep: int) -> Tensor:
    """Mark all but the `keep` highest of each column of scores [m, n]; an entry's rank is how many are lower."""
    count = len(runs)
    if count > 16:
        return runs.argsort(dim=0, stable=True).argsort(dim=0) < count - keep
    rank = torch.arange(count - 1, -1, -1, dtype=torch.int8, device=runs.device)[:, None].repeat(1, runs.shape[1])
    rows, ranks = runs.unbind(), rank.unbind()
    for first in range(count):
        for second in range(first + 1, count):
            ahead = (rows[first] <= rows[second]).view(torch.int8)
            ranks[second].add_(ahead)
            ranks[first].sub_(ahead)
    return rank < count - keep


def _lowest_of_runs(score: Tensor, keep: int, run: int) -> Tensor:
    """Mark the `run` - `keep` lowest of every `run` consecutive entries."""
    assert 0 < keep <= run, (keep, run)
    assert score.shape[-1] % run == 0, (score.shape, run)
    runs = score.reshape(-1, run).t().contiguous()  # [run, runs], so that every operation is over a contiguous row
    return lowest_of_each(runs, keep).t().reshape(score.shape)

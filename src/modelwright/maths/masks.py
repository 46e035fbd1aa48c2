"""Which entries are the lowest: boolean masks with exact counts.

Everywhere `True` means remove. Of entries that tie at the cut, those that stand first are removed, so that the count
is exact and the same scores give the same mask on every device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from modelwright.core.errors import SiteError
from modelwright.maths.slices import Sliced, Values, each, flat, slices

SAMPLE = 1 << 16  # entries that tell about where a cut lies
RUN = 1 << 8  # of which so many lie beside each other


class Cut(NamedTuple):
    """Where a sorted list is cut: all entries below `value` come before, and the first ones of those equal to it.

    Those that come before are all in the slices before `last`, and the first `ties` in the slice that starts there.
    """

    value: float
    last: int = 0
    ties: int = 0

    def mark(self, part: Tensor, at: slice) -> Tensor:
        """Mark what of a slice's values lies before the cut."""
        if at.start < self.last:
            return part <= self.value
        mask = part < self.value
        if at.start == self.last and self.ties:
            mask[(part == self.value).nonzero()[: self.ties, 0]] = True
        return mask


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
        return _lowest_of_rows(score, int(sparsity * score.shape[-1]))
    assert per == "tensor", per
    values = flat(score)
    cut = find_cut(values, score.numel(), int(sparsity * score.numel()))
    return Sliced(score.shape, torch.bool, lambda at: cut.mark(values(at), at)).whole(score.new_empty(score.shape, dtype=torch.bool))


def find_cut(values: Values, count: int, lowest: int, *, spread: float = 10.0) -> Cut:
    """Find where the `lowest` lowest of `count` values end, without a copy of them all.

    A sample brackets the cut and one pass counts what lies below the bracket and collects what lies inside: O(count).
    spread: width of the bracket, in standard deviations of a fair sample; where it misses, a wider one is tried.
    """
    if lowest <= 0:
        return Cut(float("-inf"))
    low, high = _bracket(values, count, lowest / count, spread)

    def look(at: slice) -> tuple[int, int, int, Tensor]:
        part = values(at)
        reaches = part >= low
        below = part.numel() - int(reaches.count_nonzero())
        part = part[reaches.logical_and_(part <= high)]
        inside = part[(part > low) & (part < high)]
        return below, int((part == low).count_nonzero()), int((part == high).count_nonzero()), inside

    below, at_low, at_high, inside = zip(*each(look, count), strict=True)
    rank = lowest - sum(below)
    if 0 < rank <= sum(at_low):
        return _cut_at(low, rank, at_low, count)
    rank -= sum(at_low)
    middle = torch.cat(inside)
    if 0 < rank <= middle.numel():
        value = middle.kthvalue(rank).values
        equals = [int((part == value).count_nonzero()) for part in inside]
        return _cut_at(value.item(), rank - int((middle < value).count_nonzero()), equals, count)
    rank -= middle.numel()
    if 0 < rank <= sum(at_high):
        return _cut_at(high, rank, at_high, count)
    if (low, high) == (float("-inf"), float("inf")):
        raise SiteError("Some values are NaN, so they have no order. Look for NaN in the models.")
    return find_cut(values, count, lowest, spread=8 * spread)


def quantile(values: Values, count: int, share: float) -> float:
    """The value below which that share of `count` values lies, on a straight line between its two neighbours."""
    spot = share * (count - 1)
    below = find_cut(values, count, int(spot) + 1).value
    return below if spot == int(spot) else below + (spot - int(spot)) * (find_cut(values, count, int(spot) + 2).value - below)


def _cut_at(value: float, ties: int, equals: Sequence[int], count: int) -> Cut:
    """The cut at `value` before which `ties` come of the entries that equal it, `equals` of them in each slice."""
    for at, equal in zip(slices(count), equals, strict=True):
        if ties <= equal:
            return Cut(value, at.start, ties)
        ties -= equal
    raise AssertionError(f"{ties} more ties than entries that equal {value}")


def _bracket(values: Values, count: int, fraction: float, spread: float) -> tuple[float, float]:
    """Two values between which the given quantile very likely lies."""
    if count <= SAMPLE:
        return float("-inf"), float("inf")
    random = torch.Generator().manual_seed(0)
    starts = torch.randint(count - RUN, (SAMPLE // RUN,), generator=random).tolist()
    sample = torch.cat([values(slice(start, start + RUN)) for start in starts])
    middle, width = len(sample) * fraction, spread * ((len(sample) * fraction * (1 - fraction)) ** 0.5 + 1)
    low = sample.kthvalue(int(middle - width) + 1).values.item() if middle >= width else float("-inf")
    high = sample.kthvalue(int(middle + width) + 1).values.item() if middle + width < len(sample) else float("inf")
    return low, high


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

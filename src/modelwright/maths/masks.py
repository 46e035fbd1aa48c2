"""Which entries are the lowest: boolean masks with exact counts.

Everywhere `True` means remove. Of entries that tie at the cut, those that stand first are removed, so that the count
is exact and the same scores give the same mask on every device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

SLICE = 1 << 18  # entries worked on at a time, so that they stay in the processor's cache
SAMPLE = 1 << 16  # entries that tell about where a cut lies


Values = Callable[[slice | Tensor], Tensor]  # gives the values at a slice or at an index tensor


class Cut(NamedTuple):
    """Where a sorted list is cut: all entries below `value` come before, and the first `ties` of those equal to it."""

    value: float
    ties: int

    def mark(self, part: Tensor) -> tuple[Tensor, Cut]:
        """Mark what lies before the cut in the next part [n] of the values: (mask, the cut for the parts after it)."""
        if not self.ties:
            return part < self.value, self
        mask = part <= self.value
        equal = part == self.value
        number = int(equal.count_nonzero())
        if number > self.ties:
            mask[equal.nonzero()[self.ties :, 0]] = False
        return mask, self._replace(ties=max(0, self.ties - number))


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
    flat = score.reshape(-1)
    cut = find_cut(lambda at: flat[at], flat.numel(), int(sparsity * flat.numel()))
    mask = torch.empty(flat.shape, dtype=torch.bool, device=flat.device)
    for at in slices(flat.numel()):
        mask[at], cut = cut.mark(flat[at])
    return mask.view(score.shape)


def find_cut(values: Values, count: int, lowest: int) -> Cut:
    """Find where the `lowest` lowest of `count` values end, without a copy of them all.

    A sample brackets the cut and one pass counts what lies below the bracket and collects what lies inside: O(count).
    """
    if lowest <= 0:
        return Cut(float("-inf"), 0)
    low, high = _bracket(values, count, lowest / count)
    below = at_low = 0
    inside = []
    for at in slices(count):
        part = values(at)
        above = part > low
        equal = part == low
        below += part.numel() - int(above.count_nonzero() + equal.count_nonzero())
        at_low += int(equal.count_nonzero())
        inside.append(part[above & (part < high)])
    middle = torch.cat(inside)
    rank = lowest - below
    if 0 < rank <= at_low:
        return Cut(low, rank)
    rank -= at_low
    if 0 < rank <= middle.numel():
        value = middle.kthvalue(rank).values
        return Cut(value.item(), rank - int((middle < value).count_nonzero()))
    rank -= middle.numel()
    if 0 < rank <= sum(int((values(at) == high).count_nonzero()) for at in slices(count)):
        return Cut(high, rank)
    everything = torch.cat([values(at) for at in slices(count)])  # the sample misled: the values are very unevenly spread
    value = everything.kthvalue(lowest).values
    return Cut(value.item(), lowest - int((everything < value).count_nonzero()))


def slices(count: int) -> list[slice]:
    """The slices in which `count` values are worked through."""
    return [slice(start, min(start + SLICE, count)) for start in range(0, count, SLICE)]


def _bracket(values: Values, count: int, fraction: float) -> tuple[float, float]:
    """Two values between which the given quantile almost surely lies."""
    if count <= SAMPLE:
        return float("-inf"), float("inf")
    random = torch.Generator().manual_seed(0)
    sample = values(torch.randint(count, (SAMPLE,), generator=random)).sort().values
    spread = 5 * (SAMPLE * fraction * (1 - fraction)) ** 0.5 + 5
    first, last = int(SAMPLE * fraction - spread), int(SAMPLE * fraction + spread)
    low = sample[first].item() if first >= 0 else float("-inf")
    high = sample[last].item() if last < SAMPLE else float("inf")
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

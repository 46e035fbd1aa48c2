"""Task vectors: what finetuning added to a base, made sparse, put to the vote and added up.

θ = θ0 + scale · norm(Σ_i w_i · agree(sparsify(θ_i - θ0))), tensor by tensor (task arithmetic 2212.04089, TIES 2306.01708,
DARE 2311.03099, DELLA 2406.11617, Breadcrumbs 2312.06795). Deltas are computed in float32, of float64 models in float64, a
slice at a time, and are never held whole.
"""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Callable, Sequence

import numpy
import torch
from torch import Tensor
from torch.nn.functional import hardshrink

from modelwright.maths import slices
from modelwright.maths._kernels import kernels
from modelwright.maths.bits import packed, unpacked
from modelwright.maths.masks import find_cut, find_cuts
from modelwright.maths.slices import Entries, Sliced, Stacked, Values, each, flat, halves

NOTHING = 1e-7  # of the sum of weights' sizes: a sum that is no larger is 0 but for rounding
Sparsify = Callable[[Values, tuple[int, ...]], Values]  # (a delta, its shape) -> the delta with some entries 0


def wide(*tensors: Entries) -> torch.dtype:
    """In which tensors' changes are computed: float32, and float64 where one of them is float64."""
    return functools.reduce(torch.promote_types, (tensor.dtype for tensor in tensors), torch.float32)


def sums_in(*dtypes: torch.dtype) -> torch.dtype:
    """In which sums run whose terms and result have these dtypes: float32, and float64 where one is wider than 16 bits."""
    return torch.float64 if max(dtype.itemsize for dtype in dtypes) > 2 else torch.float32


def delta(start: Entries, end: Entries) -> Values:
    """What was added between two models, in their `wide` dtype."""
    both = Stacked([flat(start), flat(end)], wide(start, end))

    def values(at: slice) -> Tensor:
        before, after = both(at)
        return after - before

    return values


def changes(base: Entries, donors: Sequence[Entries]) -> list[Values]:
    """What each donor, a tensor of base's shape, adds to the base."""
    return [delta(base, donor) for donor in donors]


# Sparsify


def trimmed(values: Values, count: int, keep: float) -> Values:
    """`count` values of which the int(keep · count) largest in size stay and the others are 0 (TIES)."""
    removed = count - min(count, int(keep * count))
    return without_lowest(values, count, removed) if removed else values


def least_of_largest(values: Values, count: int, keep: float) -> float:
    """The least size among the int(keep · count) values that are largest in size; infinite when that is none."""
    largest = min(count, int(keep * count))
    return find_cut(lambda at: -values(at).abs(), count, largest).value * -1 if largest else math.inf


def least_of_changes(base: Entries, donors: Sequence[Entries], keeps: Sequence[float]) -> list[float]:
    """The size that an entry of each donor's change must reach to be among the int(keep · n) largest; 0 where all n are kept."""
    count = math.prod(base.shape)
    return [least_of_largest(change, count, keep) if keep < 1 else 0.0 for change, keep in zip(changes(base, donors), keeps, strict=True)]


def without_below(values: Values, count: int, least: float) -> Values:
    """Values smaller in size than `least` become 0."""

    def kept(at: slice) -> Tensor:
        part = values(at)
        return hardshrink(part, _below(least, part.dtype))

    return kept


def without_lowest(values: Values, count: int, removed: int) -> Values:
    """The `removed` smallest in size become 0."""
    cut = find_cut(lambda at: values(at).abs(), count, removed)

    def kept(at: slice) -> Tensor:
        assert slices.in_order(at), at
        part = values(at)
        if at.start == cut.last:
            return part.masked_fill(cut.mark(part.abs(), at), 0)
        return hardshrink(part, cut.value if at.start < cut.last else _below(cut.value, part.dtype))  # one pass: 0 where not larger

    return kept


def _below(size: float, dtype: torch.dtype) -> float:
    """The next smaller size of a dtype: what is larger than it is at least `size`."""
    return torch.nextafter(torch.tensor(size, dtype=dtype), torch.tensor(0.0, dtype=dtype)).item()


def without_outliers(values: Values, count: int, keep: float, top: float) -> Values:
    """Zero the int(top · count) largest in size, and of the smallest as many as leave int(keep · count) (Breadcrumbs).

    Where fewer than the largest have to go, only so many of the largest go.
    """
    gone = count - min(count, int(keep * count))
    highest = min(int(top * count), gone)
    low, high = find_cuts(lambda at: values(at).abs(), count, [gone - highest, count - highest])

    def inside(at: slice) -> Tensor:
        part = values(at)
        return high.before(part.abs(), at).sub_(low.before(part.abs(), at)).mul_(part)

    return inside


def dropped(values: Values, keep: float | Values, seed: int) -> Values:
    """Each entry stays with probability `keep`, one for all or one for each entry (DARE, DELLA).

    The draws of a slice depend on the seed and on where it starts.
    """

    def kept(at: slice) -> Tensor:
        part = values(at)
        random = torch.Generator().manual_seed((seed * 1_000_003 + at.start) % (1 << 63))
        draw = torch.rand(part.shape, generator=random)
        return part * draw.to(part.device).lt_(keep if isinstance(keep, float) else keep(at))

    return kept


def remembered(values: Values, kept: Values, count: int) -> Values:
    """What was kept of `count` values; which they are is found once, and then remembered in a bit for each.

    The bits lie in one tensor: small ones among large ones that come and go would keep these from their places.
    """
    bits, known = torch.empty(-(-count // 8), dtype=torch.uint8), set[int]()

    def found(at: slice) -> Tensor:
        assert slices.in_order(at), at
        place = slice(at.start // 8, -(-at.stop // 8))
        if at.start in known:
            part = values(at)
            return part * unpacked(bits[place], len(part)).to(part)
        part = kept(at)
        bits[place] = packed(part != 0).cpu()
        known.add(at.start)
        return part

    return found


def by_rank(values: Values, shape: tuple[int, ...], keep: float, spread: float) -> Values:
    """The probability with which each entry stays: `keep` ± `spread`, rising with its rank by size in its row (DELLA).

    p = keep - spread + 2 · spread · (rank - 1)/(n - 1), rank 1 for the smallest of the row's n.
    """
    assert 0 <= keep - spread <= keep + spread <= 1, (keep, spread)
    width = shape[-1] if shape else 1

    def probability(rows: Tensor) -> Tensor:
        order = _order(rows.abs())
        steps = torch.arange(width, dtype=torch.float32, device=rows.device).mul_(2 * spread / (width - 1)).add_(keep - spread)
        return torch.empty_like(rows, dtype=torch.float32).scatter_(-1, order, steps.expand_as(rows))

    if width == 1:
        return lambda at: torch.full((at.stop - at.start,), keep)
    return by_rows([values], width, math.prod(shape), probability)


def _order(sizes: Tensor) -> Tensor:
    """The stable argsort of each row of non-negative sizes [n, width]; of an entry, its size and then its place decide."""
    if sizes.device.type != "cpu" or sizes.dtype != torch.float32:
        return sizes.argsort(dim=-1, stable=True)
    keys = sizes.contiguous().view(torch.int32).to(torch.int64).bitwise_left_shift_(32).add_(torch.arange(sizes.shape[-1]))
    keys.numpy().sort(axis=-1)  # numpy sorts whole numbers three times as fast as torch finds an order
    return keys.bitwise_and_(0xFFFFFFFF)


def by_rows(parts: Sequence[Values], width: int, count: int, function: Callable[..., Tensor]) -> Values:
    """A function of whole rows [n, width], one argument for each part, read by slices that may begin and end inside a row.

    Of rows that are wider than a slice, the two last ones are held, so that each is computed once on the way through.
    """
    if width > slices.SLICE:
        return _by_wide_rows(parts, width, function)

    def found(at: slice) -> Tensor:
        first, last = at.start // width, -(-at.stop // width)
        whole = slice(first * width, min(last * width, count))
        rows = [part(whole).reshape(-1, width) for part in parts]
        return function(*rows).reshape(-1)[at.start - first * width : at.stop - first * width]

    return found


def _by_wide_rows(parts: Sequence[Values], width: int, function: Callable[..., Tensor]) -> Values:
    known: dict[int, Tensor] = {}
    lock = threading.Lock()  # the threads' slices are of the same rows

    def row(number: int) -> Tensor:
        with lock:
            if number not in known:
                if len(known) > 1:
                    del known[next(iter(known))]  # the one that was computed first
                at = slice(number * width, (number + 1) * width)
                known[number] = function(*(part(at).reshape(1, width) for part in parts)).reshape(-1)
            return known[number]

    def found(at: slice) -> Tensor:
        rows = range(at.start // width, -(-at.stop // width))
        return torch.cat([row(number)[max(at.start - number * width, 0) : at.stop - number * width] for number in rows])

    return found


def of_rows(parts: Sequence[Values], width: int, count: int, function: Callable[..., Tensor]) -> Tensor:
    """What a function gives for each row [n, width] -> [n], one argument for each part; one number for every row is held."""

    def work(at: slice) -> Tensor:
        return function(*(part(slice(at.start * width, at.stop * width)).view(-1, width) for part in parts))

    rows = count // width if width else 0
    found = torch.empty(rows)  # at first, because small tensors among large ones that come and go keep these from their places
    size = max(1, slices.SLICE // max(1, width))
    for at, part in zip(slices.slices(rows, size), each(work, rows, size), strict=True):
        found[at] = part
    return found


def spread(numbers: Tensor, width: int) -> Values:
    """A number for each row [rows] as the values of all its entries."""

    def values(at: slice) -> Tensor:
        first, last = at.start // width, -(-at.stop // width)
        return numbers[first:last].repeat_interleave(width)[at.start - first * width : at.stop - first * width]

    return values


def restoring(values: Values, kept: Values, count: int) -> float:
    """The factor that gives what was kept of values the sum of sizes that they had (L1); 1 where nothing was."""
    after = size(kept, count)
    return size(values, count) / after if after else 1.0


def size(values: Values, count: int) -> float:
    """The sum of sizes, ‖values‖₁."""
    return sum(each(lambda at: float(values(at).abs().sum(dtype=torch.float64)), count))


# Agree and add up


def elect(deltas: Sequence[Tensor]) -> Tensor:
    """The sign, 1 or -1, that the sum of weighted deltas has at each entry; 1 where they cancel. Shaped like one."""
    total = deltas[0].clone()
    for delta in deltas[1:]:
        total.add_(delta)
    return total.ge_(0).mul_(2).sub_(1)


def average(tensors: Sequence[Entries], weights: Sequence[float], *, normalize: bool = True, dtype: torch.dtype | None = None) -> Sliced:
    """The weighted sum of tensors, Σ w_i θ_i, over Σ w_i when `normalize` is true.

    tensors: of one shape. weights: one for each; they may not sum to 0 if `normalize`. dtype: of the result, by default
    the first tensor's.

    Sums run in float32, and in float64 where a tensor or the result is wider than 16 bits, so that the result is
    rounded once. Source: arcee-ai/mergekit, linear.
    """
    assert all(tensor.shape == tensors[0].shape for tensor in tensors), [tensor.shape for tensor in tensors]
    shares = [weight / sum(weights) if normalize else weight for weight in weights]
    result = dtype or tensors[0].dtype
    wide = sums_in(result, *(tensor.dtype for tensor in tensors))
    stacked = Stacked([flat(tensor) for tensor in tensors], wide)

    def values(at: slice) -> Tensor:
        read = stacked.read(at)
        if (loops := kernels("_entry_kernels")) and wide == torch.float32 and (rows := halves(read)):
            total = torch.empty(len(read[0]))
            loops.weighted(rows, numpy.array(shares, numpy.float32), total.numpy())
            return total
        first, *others = stacked.widened(read)
        total = first * shares[0]
        for part, share in zip(others, shares[1:], strict=True):
            total.add_(part, alpha=share)
        return total

    return Sliced(tuple(tensors[0].shape), result, values)


def moved(base: Entries, donors: Sequence[Entries], weights: Sequence[float], scale: float, *, normalize: bool = False) -> Sliced:
    """The base plus `scale` times the weighted sum of what its donors learned, over the weights' sum if `normalize`; see `merge`."""
    assert all(tuple(donor.shape) == tuple(base.shape) for donor in donors), [donor.shape for donor in donors]
    stacked = Stacked([flat(one) for one in (base, *donors)], wide(base, *donors))
    shares = [weight * scale / (1.0 if not normalize or cancel(weights) else sum(weights)) for weight in weights]

    def values(at: slice) -> Tensor:
        read = stacked.read(at)
        if (loops := kernels("_entry_kernels")) and (rows := halves(read)):
            total = torch.empty(len(read[0]))
            loops.moved(rows[0], rows[1:], numpy.array(shares, numpy.float32), total.numpy())
            return total
        start, *ends = stacked.widened(read)
        return summed([end - start for end in ends], shares, normalize=False).add_(start)

    return Sliced(tuple(base.shape), base.dtype, values)


def merge(
    base: Entries,
    donors: Sequence[Entries],
    weights: Sequence[float],
    *,
    sparsify: Sequence[Sparsify] = (),
    consensus: bool = True,
    raw_votes: bool = False,
    normalize: bool = True,
    scale: float = 1.0,
) -> Sliced:
    """Add the donors' task vectors to the base.

    base, donors: tensors of one shape. weights: one for each donor; negative ones subtract. sparsify: one for each
    donor, or none. consensus: only entries whose weighted delta has the elected sign count; with raw_votes the sign
    is elected on deltas without weights. normalize: divide by the sum of the weights that count at an entry (with
    consensus, only those; 1 where it is 0). scale: λ.

    Returns a tensor of base's dtype. Without sparsify, consensus and normalize it is task arithmetic.
    Source: arcee-ai/mergekit, generalized task arithmetic. Differs: deltas are float32 or float64 and not base's dtype.
    """
    if not sparsify and not consensus:
        return moved(base, donors, weights, scale, normalize=normalize)
    change = added(base, donors, weights, sparsify=sparsify, consensus=consensus, raw_votes=raw_votes, normalize=normalize)
    return onto(base, change, scale)


def onto(base: Entries, change: Values, scale: float) -> Sliced:
    """The base plus `scale` times a change, in the base's dtype; sums run in its `wide` dtype."""
    start, dtype = flat(base), wide(base)
    return Sliced(tuple(base.shape), base.dtype, lambda at: change(at).to(dtype).mul_(scale).add_(start(at)))


def added(
    base: Entries,
    donors: Sequence[Entries],
    weights: Sequence[float],
    *,
    sparsify: Sequence[Sparsify] = (),
    consensus: bool = True,
    raw_votes: bool = False,
    normalize: bool = True,
) -> Values:
    """What `merge` adds to the base at scale 1."""
    assert all(tuple(donor.shape) == tuple(base.shape) for donor in donors), [donor.shape for donor in donors]
    whole, shape = changes(base, donors), tuple(base.shape)
    kept = [one(change, shape) for one, change in zip(sparsify, whole, strict=True)] if sparsify else whole

    def values(at: slice) -> Tensor:
        parts = [part(at) for part in kept]
        if not consensus:
            return summed(parts, weights, normalize)
        votes = elect(parts) if raw_votes else None
        parts = [part.mul_(weight) for part, weight in zip(parts, weights, strict=True)]
        return combined(parts, weights, elect(parts) if votes is None else votes, normalize)

    return values


def cancel(weights: Sequence[float]) -> bool:
    """Whether weights sum to 0, up to rounding, so that nothing can be divided by their sum."""
    return abs(sum(weights)) <= NOTHING * sum(map(abs, weights))


def summed(parts: list[Tensor], weights: Sequence[float], normalize: bool) -> Tensor:
    """Σ of deltas [n] times their weights, in the place of the first; over the sum of the weights."""
    total = parts[0].mul_(weights[0])
    for part, weight in zip(parts[1:], weights[1:], strict=True):
        total.add_(part, alpha=weight)
    return total.div_(1.0 if cancel(weights) else sum(weights)) if normalize else total


def combined(parts: list[Tensor], weights: Sequence[float], sign: Tensor, normalize: bool) -> Tensor:
    """Σ of weighted deltas [n] that have the given sign (1 or -1); over the weights that count."""
    total, shares = torch.zeros_like(parts[0]), torch.zeros_like(parts[0])
    for part, weight in zip(parts, weights, strict=True):
        agreeing = part.mul_(sign).clamp_(min=0)  # the size of what has the elected sign
        total.add_(agreeing)
        if normalize:
            shares.add_(agreeing.sign_(), alpha=weight)
    total.mul_(sign)
    if not normalize:
        return total
    nothing = NOTHING * sum(map(abs, weights))
    if min(weights) > nothing:  # so that a share of nothing is one without donors, where the total is 0 too
        return total.div_(shares.clamp_(min=nothing))
    return total.div_(shares.masked_fill_(shares.abs() <= nothing, 1))

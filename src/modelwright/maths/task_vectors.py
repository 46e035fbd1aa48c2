"""Task vectors: what finetuning added to a base, trimmed, put to the vote and added up.

θ = θ0 + scale · norm(Σ_i w_i · agree(trim(θ_i - θ0))), tensor by tensor (task arithmetic 2212.04089, TIES 2306.01708).
Deltas are computed in float32 a slice at a time and are never held whole: the memory needed beside the tensors given
and the result is that of a few slices.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import hardshrink

from modelwright.maths.masks import find_cut
from modelwright.maths.slices import Entries, Sliced, Values, flat


def trimmed(values: Values, count: int, keep: float) -> Values:
    """`count` values of which the int(keep · count) largest in size stay and the others are 0."""
    removed = count - min(count, int(keep * count))
    if not removed:
        return values
    cut = find_cut(lambda at: values(at).abs(), count, removed)
    below = torch.nextafter(torch.tensor(cut.value), torch.tensor(0.0)).item()

    def kept(at: slice) -> Tensor:
        part = values(at)
        if at.start == cut.last:
            return part.masked_fill(cut.mark(part.abs(), at), 0)
        return hardshrink(part, cut.value if at.start < cut.last else below)  # one pass: 0 where not larger

    return kept


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
    wide = torch.float64 if max(kind.itemsize for kind in (result, *(tensor.dtype for tensor in tensors))) > 2 else torch.float32
    parts = [flat(tensor) for tensor in tensors]

    def values(at: slice) -> Tensor:
        total = parts[0](at).to(wide, copy=True).mul_(shares[0])
        for part, share in zip(parts[1:], shares[1:], strict=True):
            total.add_(part(at), alpha=share)
        return total

    return Sliced(tuple(tensors[0].shape), result, values)


def merge(
    base: Entries,
    donors: Sequence[Entries],
    weights: Sequence[float],
    *,
    keep: float | Sequence[float] = 1.0,
    consensus: bool = True,
    normalize: bool = True,
    scale: float = 1.0,
) -> Sliced:
    """Add the donors' task vectors to the base.

    base, donors: tensors of one shape. weights: one for each donor; negative ones subtract. keep: the fraction of each
    donor's delta that `trimmed` keeps, one for all or one for each. consensus: only entries whose weighted delta has
    the elected sign count. normalize: divide by the sum of the weights that count at an entry (with consensus, only
    those; 1 where it is 0). scale: λ.

    Returns a tensor of base's dtype. keep=1 without consensus or normalize is task arithmetic; the defaults with a
    smaller keep are TIES. Source: arcee-ai/mergekit, generalized task arithmetic.
    Differs: deltas are float32 and not base's dtype.
    """
    assert all(donor.shape == base.shape for donor in donors), [donor.shape for donor in donors]
    keeps = [keep] * len(donors) if isinstance(keep, int | float) else list(keep)
    count = math.prod(base.shape)
    start = flat(base)
    kept = [trimmed(delta(start, flat(donor)), count, fraction) for donor, fraction in zip(donors, keeps, strict=True)]

    def values(at: slice) -> Tensor:
        parts = [part(at).mul_(weight) for part, weight in zip(kept, weights, strict=True)]
        return _combined(parts, weights, consensus, normalize).mul_(scale).add_(start(at))

    return Sliced(tuple(base.shape), base.dtype, values)


def delta(start: Values, end: Values) -> Values:
    """What was added between two models, in float32."""
    return lambda at: end(at).to(torch.float32, copy=True).sub_(start(at))


def _combined(parts: list[Tensor], weights: Sequence[float], consensus: bool, normalize: bool) -> Tensor:
    """Σ of weighted deltas [n] that agree with the sign of the whole, over the weights that count."""
    if not consensus:
        total = torch.stack(parts).sum(0)
        return total.div_(sum(weights) or 1.0) if normalize else total
    sign = elect(parts)
    total, shares = torch.zeros_like(parts[0]), torch.zeros_like(parts[0])
    for part, weight in zip(parts, weights, strict=True):
        agreeing = part.mul_(sign).clamp_(min=0)  # the size of what has the elected sign
        total.add_(agreeing)
        if normalize:
            shares.add_(agreeing.sign_(), alpha=weight)
    total.mul_(sign)
    return total.div_(shares.masked_fill_(shares == 0, 1)) if normalize else total

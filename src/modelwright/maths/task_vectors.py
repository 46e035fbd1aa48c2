"""Task vectors: what finetuning added to a base, trimmed, put to the vote and added up.

θ = θ0 + scale · norm(Σ_i w_i · agree(trim(θ_i - θ0))), tensor by tensor (task arithmetic 2212.04089, TIES 2306.01708).
Deltas are computed in float32 a slice at a time and are never held whole: the memory needed beside the tensors given
and the result is that of a few slices.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from modelwright.maths.masks import Values, find_cut, slices


def trim(delta: Tensor, keep: float) -> Tensor:
    """Keep the int(keep · n) entries of largest size and zero the others; a new tensor like `delta`, of any shape."""
    result = delta.detach().clone(memory_format=torch.contiguous_format)
    flat = result.view(-1)
    for at, part in _trimmed(lambda at: flat[at], flat.numel(), keep):
        flat[at] = part
    return result


def elect(deltas: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """The sign that the weighted sum of the deltas has at each entry: True where Σ w_i δ_i ≥ 0. Shaped like one."""
    total = torch.zeros_like(deltas[0], dtype=torch.float32)
    for delta, weight in zip(deltas, weights, strict=True):
        total.add_(delta, alpha=weight)
    return total >= 0


def average(
    tensors: Sequence[Tensor],
    weights: Sequence[float],
    *,
    normalize: bool = True,
    dtype: torch.dtype | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """The weighted sum of tensors, Σ w_i θ_i, over Σ w_i when `normalize` is true.

    tensors: of one shape. weights: one for each; they may not sum to 0 if `normalize`. dtype: of the result, by default
    the first tensor's. out: where the result goes, which may be one of the tensors.

    Sums run in float32, and in float64 where a tensor or the result is wider than 16 bits, so that the result is
    rounded once. Source: arcee-ai/mergekit, linear.
    """
    assert all(tensor.shape == tensors[0].shape for tensor in tensors), [tensor.shape for tensor in tensors]
    result = torch.empty(tensors[0].shape, dtype=dtype or tensors[0].dtype, device=tensors[0].device) if out is None else out
    shares = [weight / sum(weights) if normalize else weight for weight in weights]
    wide = max(tensor.element_size() for tensor in (*tensors, result)) > 2
    parts = [tensor.detach().reshape(-1) for tensor in tensors]
    flat = result.view(-1)
    places = slices(flat.numel())
    sums = torch.empty(places[0].stop if places else 0, dtype=torch.float64 if wide else torch.float32, device=flat.device)
    for at in places:
        total = sums[: at.stop - at.start].copy_(parts[0][at]).mul_(shares[0])
        for part, share in zip(parts[1:], shares[1:], strict=True):
            total.add_(part[at], alpha=share)
        flat[at] = total
    return result


def merge(
    base: Tensor,
    donors: Sequence[Tensor],
    weights: Sequence[float],
    *,
    keep: float | Sequence[float] = 1.0,
    consensus: bool = True,
    normalize: bool = True,
    scale: float = 1.0,
    out: Tensor | None = None,
) -> Tensor:
    """Add the donors' task vectors to the base.

    base, donors: tensors of one shape. weights: one for each donor; negative ones subtract. keep: the fraction of each
    donor's delta kept by `trim`, one for all or one for each. consensus: only entries whose weighted delta has the
    elected sign count. normalize: divide by the sum of the weights that count at an entry (with consensus, only those;
    1 where it is 0). scale: λ. out: where the result goes, which may be `base` or a donor.

    Returns a tensor of base's dtype. keep=1 without consensus or normalize is task arithmetic; the defaults with a
    smaller keep are TIES. Source: arcee-ai/mergekit, generalized task arithmetic.
    Differs: deltas are float32 and not base's dtype.
    """
    assert all(donor.shape == base.shape for donor in donors), [donor.shape for donor in donors]
    keeps = [keep] * len(donors) if isinstance(keep, int | float) else list(keep)
    result = torch.empty(base.shape, dtype=base.dtype, device=base.device) if out is None else out
    start = base.detach().reshape(-1)
    ends = [donor.detach().reshape(-1) for donor in donors]
    count = start.numel()

    def delta(end: Tensor) -> Values:
        return lambda at: end[at].float() - start[at].float()

    flat = result.view(-1)
    trimmed = [_trimmed(delta(end), count, fraction) for end, fraction in zip(ends, keeps, strict=True)]
    for found in zip(*trimmed, strict=True):
        at = found[0][0]
        parts = [part.mul_(weight) for (_, part), weight in zip(found, weights, strict=True)]
        flat[at] = _combined(parts, weights, consensus, normalize).mul_(scale).add_(start[at])
    return result


def merge_ties(
    base: Tensor,
    donors: Sequence[Tensor],
    weights: Sequence[float],
    keep: float | Sequence[float] = 0.2,
    scale: float = 1.0,
    normalize: bool = True,
    out: Tensor | None = None,
) -> Tensor:
    """Trim, elect signs and merge, as TIES does; the arguments are those of `merge`."""
    return merge(base, donors, weights, keep=keep, scale=scale, normalize=normalize, out=out)


def _combined(parts: list[Tensor], weights: Sequence[float], consensus: bool, normalize: bool) -> Tensor:
    """Σ of weighted deltas [n] that agree with the sign of the whole, over the weights that count."""
    if not consensus:
        total = torch.stack(parts).sum(0)
        return total.div_(sum(weights) or 1.0) if normalize else total
    sign = elect(parts, [1.0] * len(parts)).to(parts[0].dtype).mul_(2).sub_(1)
    total, shares = torch.zeros_like(parts[0]), torch.zeros_like(parts[0])
    for part, weight in zip(parts, weights, strict=True):
        agreeing = part.mul_(sign).clamp_(min=0)  # the size of what has the elected sign
        total.add_(agreeing)
        if normalize:
            shares.add_(agreeing.sign_(), alpha=weight)
    total.mul_(sign)
    return total.div_(shares.masked_fill_(shares == 0, 1)) if normalize else total


def _trimmed(values: Values, count: int, keep: float) -> Iterator[tuple[slice, Tensor]]:
    """Go through the values slice by slice: pairs of a slice and its values, the smallest zeroed."""
    removed = count - min(count, int(keep * count))
    cut = find_cut(lambda at: values(at).abs(), count, removed)
    for at in slices(count):
        part = values(at)
        if removed:
            mask, cut = cut.mark(part.abs())
            part.masked_fill_(mask, 0)
        yield at, part

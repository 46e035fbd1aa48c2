"""Put parts of several models beside each other: where masks overlap, their mean."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from modelwright.maths.slices import Entries, Sliced, Values, flat


def reaching(change: Values, least: float) -> Values:
    """True where a change is at least `least` in size; never where nothing changed."""
    return lambda at: change(at).abs_() >= least if least > 0 else change(at) != 0


def needed(change: torch.Tensor, total: torch.Tensor, least: float) -> torch.Tensor:
    """A TALL mask: true where |τ| > λ·|τ_M - τ|, with a donor's change τ, λ `least` and the merged change τ_M `total`.

    Source: Wang et al. 2024, arXiv:2405.07813, equation 5.
    """
    return change.abs() > (total - change).abs_().mul_(least)


def stitched(base: Entries, donors: Sequence[Entries], masks: Sequence[Values], weights: Sequence[float], scale: float) -> Sliced:
    """θ = θ0 + scale · (Σ m_i w_i θ_i / Σ m_i w_i - θ0) where some mask m_i is true, and θ0 elsewhere.

    base, donors: tensors of one shape. masks: the boolean values of each donor's. weights: one for each donor, above 0.

    Returns a tensor of base's dtype. With scale 1, an entry of one mask alone is the donor's, bit for bit.
    """
    start, ends = flat(base), [flat(donor) for donor in donors]

    def values(at: slice) -> torch.Tensor:
        own = start(at).to(torch.float64, copy=True)
        total, shares = torch.zeros_like(own), torch.zeros_like(own)
        for end, mask, weight in zip(ends, masks, weights, strict=True):
            part = mask(at).to(own.dtype).mul_(weight)
            total.addcmul_(part, end(at).double())
            shares.add_(part)
        mean = torch.where(shares > 0, total.div_(shares), own)
        return own.lerp_(mean, scale)

    return Sliced(tuple(base.shape), base.dtype, values)

"""A mask over channels that is learnt and becomes sharp: Liu et al. 2024, Pruning-Aware Tuning, arXiv:2408.14721.

Each channel has a logit a, all 0 at first. In step t of N the mask is σ(τ a) + max(1/2 - t/N, 0) with τ = 1/(1 - ln t / ln N),
which is 1 everywhere at first and tends to 1 where a > 0 and to 0 elsewhere. The losses make as many positive as shall stay.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def sharpness(step: int, steps: int) -> float:
    """τ, which rises from 0 at the first step (0) without bound towards the last."""
    return 1 / (1 - math.log(step) / math.log(steps) + 1e-6) if step >= 1 else 0.0


def soft_mask(logits: Tensor, step: int, steps: int) -> Tensor:
    """The mask [channels] at a step (from 0) of `steps`."""
    return (sharpness(step, steps) * logits).sigmoid() + max(0.5 - step / steps, 0.0)


def sharp_mask(logits: Tensor, width: int) -> Tensor:
    """1 for the `width` channels with the highest logits, of equals the first, and 0 for the others; without a gradient."""
    mask = torch.zeros_like(logits.detach())
    mask[logits.detach().argsort(descending=True, stable=True)[:width]] = 1
    return mask


def too_many(logits: Tensor, width: int) -> Tensor:
    """10 · |channels with a ≥ 0, less `width`| / width, as a scalar whose gradient goes through the count as if it were the sum."""
    counted = (logits >= 0).to(logits.dtype).detach() + logits - logits.detach()
    return 10 * (counted.sum() - width).abs() / width


def undecided(logits: Tensor) -> Tensor:
    """The mean of (a - 1/2)² over positive logits, plus that of (a + 1/2)² over the others; 0 for a side without any."""
    sides = ((logits[logits > 0] - 0.5).square(), (logits[logits <= 0] + 0.5).square())
    return torch.stack([side.mean() if len(side) else logits.sum() * 0 for side in sides]).sum()


def not_orthogonal(rows: Tensor) -> Tensor:
    """The mean over entries of (L Lᵀ - I)² for rows L [n, width]."""
    return (rows @ rows.T - torch.eye(len(rows), device=rows.device, dtype=rows.dtype)).square().mean()

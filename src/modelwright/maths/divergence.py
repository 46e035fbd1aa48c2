"""How far one distribution is from another: over tokens by one formula and its special cases, of two samples by their steps.

mixKL(a, b, w) = Σ a log(a / (w·a + (1−w)·b)), from logits. With the target p and the model's q:
forward KL = mixKL(p, q, 0); reverse KL = mixKL(q, p, 0); skew KL (DistiLLM, arXiv:2402.03898) = mixKL(p, q, w);
generalised Jensen-Shannon (GKD, arXiv:2306.13649) = β·mixKL(p, q, β) + (1−β)·mixKL(q, p, 1−β).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def mixed_kl(a_logits: Tensor, b_logits: Tensor, w: float = 0.0, temperature: float = 1.0, mask: Tensor | None = None) -> Tensor:
    """KL(a ‖ w·a + (1−w)·b) in nats, a scalar: the mean over the valid positions.

    `a_logits` and `b_logits` are [..., vocabulary] and are divided by `temperature`; a logit of −inf is a token of
    probability 0. `mask` [...] is true where a position counts. Sums run in float32. The result is not multiplied by
    temperature²; do so where gradients of several temperatures should have one size. At w = 1 it is 0.
    """
    log_a = torch.log_softmax(a_logits.float() / temperature, -1)
    log_b = torch.log_softmax(b_logits.float() / temperature, -1)
    possible = torch.isfinite(log_a)  # 0·log 0 = 0; filled before the subtraction so that no gradient is NaN
    log_mix = log_b if w == 0 else log_a if w == 1 else _mixture(log_a, log_b, w)
    ratio = log_a.masked_fill(~possible, 0.0) - log_mix.masked_fill(~possible, 0.0)
    return _mean((log_a.exp() * ratio).sum(-1), mask)


def kolmogorov_smirnov(first: Tensor, second: Tensor) -> float:
    """The largest difference of the cumulated distributions of two samples [n] and [m], from 0 to 1."""
    first, second = first.sort().values, second.sort().values
    points = torch.cat([first, second])
    below = [torch.searchsorted(sample, points, right=True).double() / len(sample) for sample in (first, second)]
    return float((below[0] - below[1]).abs().max())


def _mixture(log_a: Tensor, log_b: Tensor, w: float) -> Tensor:
    """log(w·a + (1−w)·b); where both are impossible the result is −inf with a zero gradient."""
    neither = torch.isinf(log_a) & torch.isinf(log_b)
    mixed = torch.logaddexp(log_a.masked_fill(neither, 0.0) + math.log(w), log_b.masked_fill(neither, 0.0) + math.log1p(-w))
    return mixed.masked_fill(neither, -math.inf)


def _mean(values: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return values.mean()
    return values.masked_fill(~mask, 0.0).sum() / mask.sum().clamp(min=1)

"""A matrix as a product of low rank and a sparse rest, greedily: W ≈ P Q + S."""

from __future__ import annotations

import torch
from torch import Tensor

PASSES = 2  # over P, Q and S in each round


def rest(weight: Tensor, rounds: int = 100, directions: int = 5, threshold: float = 0.01) -> Tensor:
    """W - P Q [out, in] of the greedy decomposition; S is what of it is larger than the threshold.

    weight: [out, in]. Q begins with `directions` random rows, and gains as many random mixes of the rest's rows in each of `rounds`. A
    round begins with S = 0 and twice takes P = qr((W - S) Qᵀ), Q = Pᵀ (W - S), and S as the entries of W - P Q above the threshold. It
    ends before P Q has the weight's full rank. Zhou, Tao 2013, "Greedy bilateral sketch, completion and smoothing", as DSEE uses it
    (2111.00160, algorithm 1).
    """
    exact = weight.float()
    most = max(1, min(exact.shape) - 1)
    right = torch.randn(min(directions, most), exact.shape[1], device=exact.device)
    for number in range(rounds):
        sparse = torch.zeros_like(exact)
        for _ in range(PASSES):
            left = torch.linalg.qr((exact - sparse) @ right.T).Q
            right = left.T @ (exact - sparse)
            left_over = exact - left @ right
            sparse = torch.where(left_over.abs() > threshold, left_over, 0.0)
        if number + 1 == rounds or len(right) + directions > most:
            break
        more = torch.randn(directions, exact.shape[0], device=exact.device) @ (left_over - sparse)
        right = torch.cat([right, more])
    return left_over

"""How much of an MLP's output its weakest neurons make up, and the threshold below which they make up a given share.

Luo et al. 2024, Sparsing Law, arXiv:2411.02335: neuron i, which the matrix W [out, n] reads as a_i, contributes |a_i| ‖W_i‖.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

GRID = 65536  # thresholds that are tried
HIGHEST = 0.99  # of contributions that lie below the largest of them


class Neurons:
    """Activations of some tokens, inputs [tokens, n], and the matrix through which they are written, weight [out, n]."""

    def __init__(self, inputs: Tensor, weight: Tensor):
        self.inputs, self.weight = inputs.float(), weight.float()
        self.norms = self.weight.norm(dim=0)
        self.sizes = self.inputs.abs() * self.norms
        self._whole = (self.inputs @ self.weight.T).norm(dim=1)
        flat = self.sizes.flatten()
        self._low = float(flat.min())
        self._high = float(flat.kthvalue(max(int(HIGHEST * len(flat)), 1)).values)
        self._shares: Callable[[int], float] = functools.cache(lambda place: self.share(self._threshold(place)))

    def share(self, threshold: float) -> float:
        """CETT: the mean over tokens of ‖sum of what contributions up to the threshold write‖ / ‖sum of all‖."""
        lost = (self.inputs.masked_fill(self.sizes > threshold, 0) @ self.weight.T).norm(dim=1)
        return float(torch.where(lost > 0, lost / self._whole.clamp_min(1e-30), 0).double().mean())

    def threshold(self, share: float) -> float:
        """The largest threshold of the grid whose CETT is at most `share`, by bisection; 0 where none is, or none is asked for.

        Larger shares never give smaller thresholds.
        """
        fits, fails = -1, GRID if share > 0 else 0
        while fails - fits > 1:
            middle = (fits + fails) // 2
            fits, fails = (middle, fails) if self._shares(middle) <= share else (fits, middle)
        return self._threshold(fits) if fits >= 0 else 0.0

    def _threshold(self, place: int) -> float:
        return self._low + (self._high - self._low) * place / (GRID - 1)


def highest_level(fits: Callable[[float], bool], most: float, halvings: int) -> float:
    """By bisection the highest level from 0, which always fits, to `most` that fits.

    Of two tests of which one takes whatever the other takes, it never has the lower level.
    """
    if fits(most):
        return most
    low, high = 0.0, most
    for _ in range(halvings):
        middle = (low + high) / 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low

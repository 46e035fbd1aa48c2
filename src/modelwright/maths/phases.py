"""Real matrices as pairs of complex ones, and the grid of phases {1, -1, i, -i} with a scale for each axis.

A real A [2n, 2m] acts on x [2m] as y = U z + W z̄ with z = x[:m] + i x[m:] and y = Re, Im of n numbers. Source: Wang et al. 2025,
arXiv:2512.02901, sections 3.1 to 3.3.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Phases(NamedTuple):
    """Codes and scales of complex matrices: code 2 · axis + sign, of axis 0 the real one and sign 1 minus."""

    codes: Tensor  # uint8 [..., n, m]
    scale: Tensor  # float32 [..., 2, n or 1], of the real and the imaginary axis


def paired(weight: Tensor) -> Tensor:
    """A real matrix [2n, 2m] → complex64 [2, n, m]: U and W. Each pair of entries is turned by 45° and divided by √2."""
    (first, second), (third, fourth) = (half.float().chunk(2, 1) for half in weight.chunk(2, 0))
    return torch.stack([torch.complex(first + fourth, third - second), torch.complex(first - fourth, second + third)]) / 2


def unpaired(pair: Tensor) -> Tensor:
    """The real matrix, float32 [2n, 2m], of U and W [2, n, m]."""
    one, two = pair
    upper = torch.cat([one.real + two.real, two.imag - one.imag], 1)
    return torch.cat([upper, torch.cat([two.imag + one.imag, one.real - two.real], 1)])


def fit(values: Tensor, by_row: bool = False) -> Phases:
    """The nearest phases of complex matrices [..., n, m]; of numbers on the diagonals the imaginary axis.

    An axis' scale is the mean size of the parts along it of the numbers that go to it, in the matrix or the row, and 0 where none do.
    That is the one with the least squares, so that what is left over is never larger than the values.
    """
    real = values.real.abs() > values.imag.abs()
    parts = torch.where(real, values.real, values.imag)
    codes = 2 * (~real).to(torch.uint8) + (parts < 0).to(torch.uint8)
    over = (-1,) if by_row else (-2, -1)
    sizes = [(parts.abs() * own).sum(over) / own.sum(over).clamp(min=1) for own in (real, ~real)]
    scale = torch.stack(sizes, -2 if by_row else -1).float()
    return Phases(codes, scale if by_row else scale.unsqueeze(-1))


def decode(phases: Phases) -> Tensor:
    """The complex numbers that phases stand for, complex64 [..., n, m]."""
    sign = 1.0 - 2.0 * (phases.codes & 1)
    sizes = [(sign * ((phases.codes >> 1) == axis)) * phases.scale[..., axis, :, None] for axis in range(2)]
    return torch.complex(*sizes)

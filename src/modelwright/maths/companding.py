"""Numbers in 8-bit floats with a power and two scales for each group: COAT's states of an optimizer.

A group's sizes |x| lie between μ and M. (|x| / c)^k, c = √(M μ), spreads them over the range of E4M3, and M becomes its largest, 448.
Source: Xi et al. 2024, arXiv:2410.19313, section 3.2, as the authors' optimizer has it. Zeros are zeros, and count in no μ.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from modelwright.maths.scales import LARGEST

GROUP = 128  # consecutive numbers that share a power and scales
PARTS = 16  # of 1 that powers are rounded down to
RANGE = math.log2(LARGEST**2 / 2)  # log2 of the largest number over the least that E4M3 holds well
HIGHEST = 32.0  # power
SPREAD = 1e-6  # log2(M / μ) below which there is nothing to spread


class Companded(NamedTuple):
    """Groups of 8-bit floats, the last one padded with zeros."""

    codes: Tensor  # float8_e4m3fn [n]
    scale: Tensor  # float32 [groups]: of the spread numbers, over the codes
    power: Tensor  # float32 [groups]: k
    centre: Tensor  # float32 [groups]: c


def encode(values: Tensor) -> Companded:
    """The codes of values of any shape, as a row. What is not 0 does not become 0: the least of a group is never below 2^-8."""
    flat = values.float().flatten()
    grouped = pad(flat, (0, -len(flat) % GROUP)).view(-1, GROUP)
    sizes = grouped.abs()
    largest = sizes.amax(1)
    least = torch.where(sizes > 0, sizes, torch.inf).amin(1).clamp(max=largest)
    ratio = torch.where(largest > 0, largest.double().log2() - least.double().log2(), 0.0)
    power = (PARTS * RANGE / ratio.clamp(min=SPREAD)).floor() / PARTS
    power = torch.where(ratio < SPREAD, 1.0, power.clamp(1 / PARTS, HIGHEST)).float()
    centre = torch.where(largest > 0, largest.sqrt() * least.sqrt(), 1.0)
    scale = torch.where(largest > 0, (largest / centre).pow(power) / LARGEST, 1.0)
    spread = (sizes / centre[:, None]).pow(power[:, None]) / scale[:, None]
    codes = torch.copysign(spread.clamp(max=LARGEST), grouped).to(torch.float8_e4m3fn).flatten()[: len(flat)]
    return Companded(codes, scale, power, centre)


def decode(stored: Companded) -> Tensor:
    """The values of codes, float32 [n]: sign(u) |u|^(1/k) · c with u = code · scale."""
    flat = stored.codes.float()
    grouped = pad(flat, (0, -len(flat) % GROUP)).view(-1, GROUP) * stored.scale[:, None]
    sizes = grouped.abs().pow(1 / stored.power[:, None]) * stored.centre[:, None]
    return torch.copysign(sizes, grouped).flatten()[: len(flat)]

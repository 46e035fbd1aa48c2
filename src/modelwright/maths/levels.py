"""Levels: the few numbers that a code stands for before it is scaled, and the nearest of them.

A code of b bits is an index into a table of up to 2^b levels: those of floats of 4 bits, of NF4, of signs, or of k-means.
"""

from __future__ import annotations

import functools
import math
from statistics import NormalDist
from typing import NamedTuple

import torch
from torch import Tensor

NF4_END = 0.9677083  # of the normal distribution that NF4 cuts: 1 - (1/32 + 1/30) / 2, with as many digits as bitsandbytes has
SAMPLE = 1 << 18  # values that k-means looks at


class Levels(NamedTuple):
    """A table of levels. Of two that are equally near, the one whose tie it is: `bounds` lie just below or on the middle."""

    values: Tensor  # [count] float32: code → level
    bounds: Tensor  # [count - 1]: a number in (bounds[k - 1], bounds[k]] is nearest to the k-th smallest level
    codes: Tensor  # [count] uint8: the code of the k-th smallest level
    bits: int

    @property
    def largest(self) -> float:
        """The largest size of a level."""
        return float(self.values.abs().max())

    def encode(self, numbers: Tensor) -> Tensor:
        """The codes of the nearest levels, uint8, of float32 numbers of any shape."""
        return self.codes.to(numbers.device)[torch.bucketize(numbers.contiguous(), self.bounds.to(numbers.device))]

    def decode(self, codes: Tensor) -> Tensor:
        """The levels that codes stand for, float32."""
        return self.values.to(codes.device)[codes.int()]

    def snap(self, numbers: Tensor) -> Tensor:
        """The nearest levels themselves."""
        return self.decode(self.encode(numbers))


def levels(values: Tensor, *, even: bool = False) -> Levels:
    """Levels by their codes. even: of two equally near, the one whose place among the sizes is even; else the smaller one."""
    ordered, codes = values.float().sort()
    bounds = (ordered[1:] + ordered[:-1]) / 2
    if even:
        sizes = values.float().abs().unique()
        odd = torch.searchsorted(sizes, ordered[:-1].abs()) % 2 == 1  # so the tie goes to the larger of the two
        bounds = torch.where(odd, torch.nextafter(bounds, torch.tensor(-math.inf)), bounds)
    return Levels(values.float(), bounds, codes.to(torch.uint8), max(1, (len(values) - 1).bit_length()))


@functools.cache
def named(name: str, bits: int = 4) -> Levels:
    """The levels of a name: nf4, e2m1, sign, ternary; or odd, the odd whole numbers of so many bits."""
    if name == "nf4":
        return levels(normal_float())
    if name == "e2m1":  # sign · 2^3 + index
        sizes = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
        return _without_negative_zero(levels(torch.cat([sizes, -sizes]), even=True))
    if name == "sign":
        return levels(torch.tensor([-1.0, 1.0]))._replace(bounds=torch.nextafter(torch.zeros(1), torch.tensor(-1.0)))  # 0 is +1
    if name == "ternary":
        return levels(torch.tensor([-1.0, 0.0, 1.0]), even=True)
    assert name == "odd", name
    return levels(2.0 * torch.arange(2**bits) - (2**bits - 1), even=True)


def normal_float() -> Tensor:
    """The 16 levels of NF4: quantiles of a normal distribution, 7 below 0, 0 itself, 8 above, the largest 1.

    Source: Dettmers et al. 2023, arXiv:2305.14314, appendix E; in float32, so that they are those of bitsandbytes to the bit.
    """
    quantile = NormalDist().inv_cdf
    above, below = ([quantile(share) for share in torch.linspace(NF4_END, 0.5, count + 1)[:-1].tolist()] for count in (8, 7))
    found = torch.tensor([*above, 0.0, *(-value for value in below)]).sort().values
    return found / found.max()


def k_means(numbers: Tensor, bits: int, iterations: int = 50) -> Levels:
    """2^bits levels with the least squares to these numbers: Lloyd's iteration from their quantiles; levels of one value coincide."""
    flat = numbers.flatten()
    if len(flat) > SAMPLE:  # drawn, since every so many would be some columns alone
        flat = flat[torch.randint(len(flat), (SAMPLE,), generator=torch.Generator().manual_seed(0)).to(flat.device)]
    seen = flat.float().sort().values
    count = 2**bits
    centres = seen[((torch.arange(count, device=seen.device) + 0.5) * len(seen) / count).long()]
    sums = torch.cat([seen.new_zeros(1, dtype=torch.float64), seen.double().cumsum(0)])
    for _ in range(iterations):
        cuts = torch.searchsorted(seen, (centres[1:] + centres[:-1]) / 2)
        ends = torch.cat([cuts.new_zeros(1), cuts, cuts.new_full((1,), len(seen))])
        members = ends.diff()
        means = (sums[ends[1:]] - sums[ends[:-1]]) / members.clamp(min=1)
        moved = torch.where(members > 0, means.float(), centres)
        if torch.equal(moved, centres):
            break
        centres = moved
    return levels(centres.cpu())


def _without_negative_zero(table: Levels) -> Levels:
    """The same, where what is nearest to zero has the code of +0: numbers between the two bounds around zero."""
    codes = table.codes.clone()
    codes[table.values[codes.int()] == 0] = int((table.values == 0).nonzero()[0])
    return table._replace(codes=codes)

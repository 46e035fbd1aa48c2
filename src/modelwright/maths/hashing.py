"""Fixed random maps from many weights to few stored values: W[i] = λ · s(i) · ψ[h(i)], with one stored value for each weight.

Desai, Shrivastava 2023, arXiv:2310.11611. h and the signs s are functions of a weight's number in the whole model and of a
seed; nothing of them is stored, and they are computed for a slice of weights at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

PRIME = 2038074743  # so that products of two remainders fit into int64
EDGE = 32  # rows and columns of a block that is read in one piece
AT_ONCE = 1 << 20  # weights whose places are in memory at a time
SIGNS = 1  # added to the seed for the signs

Form = Literal["pareto", "roast", "hashednet"]
Scaling = Literal["projection", "mean", "root", "none"]


@dataclass(frozen=True)
class Map:
    """Where the weights of one matrix [out, in] are read from.

    pareto: the weights of the model follow each other through ψ, and each time that they begin anew ψ is rotated, so that the
    loads of two places differ by at most one. roast: blocks of 32 × 32 weights, each from a place of its own. hashednet: each
    weight from a place of its own.
    """

    form: Form
    size: int  # values in ψ
    seed: int
    offset: int  # the number of the matrix's first weight
    shape: tuple[int, int]
    scale: float  # λ

    def places(self, start: int, stop: int, device: torch.device | str | None = None) -> tuple[Tensor, Tensor]:
        """For rows `start` to `stop`: places in ψ, int64, and λ · s, float32, both [rows · in]."""
        columns = self.shape[1]
        within = torch.arange(start * columns, stop * columns, device=device)
        number = within + self.offset
        signs = 1 - 2 * (hashed(number, 1 << 30, self.seed + SIGNS) & 1)
        if self.form == "pareto":
            found = (hashed(number // self.size, self.size, self.seed) + number % self.size) % self.size
        elif self.form == "hashednet":
            found = hashed(number, self.size, self.seed)
        else:
            row, column = within // columns, within % columns
            block = row // EDGE * -(-columns // EDGE) + column // EDGE
            found = hashed(block + self.offset, self.size - EDGE**2, self.seed) + row % EDGE * EDGE + column % EDGE
        return found, self.scale * signs.float()

    def slices(self) -> Iterator[tuple[int, int]]:
        """The rows in runs of not too many weights."""
        step = max(1, AT_ONCE // self.shape[1])
        for start in range(0, self.shape[0], step):
            yield start, min(start + step, self.shape[0])

    def read(self, values: Tensor, start: int, stop: int) -> Tensor:
        """Rows `start` to `stop` of the weight, in the dtype of ψ."""
        places, factors = self.places(start, stop, values.device)
        return (values[places] * factors.to(values.dtype)).view(-1, self.shape[1])

    def add(self, total: Tensor, part: Tensor, start: int, stop: int) -> None:
        """Add Rᵀ of these rows [rows, in] to `total` [size]."""
        places, factors = self.places(start, stop, total.device)
        total.index_add_(0, places, part.flatten().to(total.dtype) * factors.to(total.dtype))


def hashed(number: Tensor, size: int, seed: int) -> Tensor:
    """((a x + b x² + c) mod P) mod size, for whole numbers x of at least 0; a and b odd, all three from the seed."""
    draws = torch.randint(1, PRIME // 2, (3,), generator=torch.Generator().manual_seed(seed)).tolist()
    a, b, c = 2 * draws[0] - 1, 2 * draws[1] - 1, draws[2]
    x = number % PRIME
    return (a * x % PRIME + b * (x * x % PRIME) % PRIME + c) % PRIME % size


def sums(maps: Iterable[Map], size: int, device: torch.device | str | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """For each place [size], over all weights that read it: Σ λ², Σ λ, and their number, float32."""
    squares, first, loads = torch.zeros(3, size, device=device)
    for one in maps:
        for start, stop in one.slices():
            places, _ = one.places(start, stop, device)
            for total, each in ((squares, one.scale**2), (first, one.scale), (loads, 1.0)):
                total.index_add_(0, places, torch.full((len(places),), each, device=device))
    return squares, first, loads


def divisor(maps: Iterable[Map], size: int, scaling: Scaling, device: torch.device | str | None = None) -> Tensor:
    """What the gradient Rᵀ g is divided by, [size]; 1 where no weight reads.

    projection: Σ λ², so that a plain gradient step moves the weights by the orthogonal projection of the step that they would
    take each for itself. mean: (Σ λ)² over their number. root: √Σ λ². none: 1.
    """
    squares, first, loads = sums(maps, size, device)
    found = {
        "projection": squares, "mean": first.square() / loads.clamp(min=1), "root": squares.sqrt(), "none": torch.ones_like(squares),
    }[scaling]  # fmt: skip
    return torch.where(found > 0, found, 1.0)


def projected(weights: Sequence[Tensor], maps: Sequence[Map], size: int) -> Tensor:
    """ψ [size] float32 of least squared distance from these weights [out, in]: (RᵀR)⁻¹ Rᵀ w; 0 where no weight reads."""
    total = torch.zeros(size, dtype=torch.float64, device=weights[0].device)
    for weight, one in zip(weights, maps, strict=True):
        for start, stop in one.slices():
            one.add(total, weight[start:stop].double(), start, stop)
    return (total / divisor(maps, size, "projection", total.device)).float()


def mixed(values: Tensor, salt: int = 0) -> Tensor:
    """A fixed mix of the 64 bits of whole numbers, at least 0; the same in every process and on every device.

    The finaliser of SplitMix64 (Steele, Lea, Flood 2014, Fast splittable pseudorandom number generators, OOPSLA) on
    value + salt · 2^64 / golden ratio, without the sign bit. Salts give functions that have nothing to do with each other.
    """

    def signed(number: int) -> int:
        return (number + 2**63) % 2**64 - 2**63

    def shifted(z: Tensor, bits: int) -> Tensor:
        return (z >> bits) & (2 ** (64 - bits) - 1)

    z = values.long() + signed((salt + 1) * 0x9E3779B97F4A7C15)
    z = (z ^ shifted(z, 30)) * signed(0xBF58476D1CE4E5B9)
    z = (z ^ shifted(z, 27)) * signed(0x94D049BB133111EB)
    return (z ^ shifted(z, 31)) & (2**63 - 1)

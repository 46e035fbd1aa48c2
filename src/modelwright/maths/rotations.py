"""Orthogonal matrices that spread what is far out over all directions: Hadamard's, with random signs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def hadamard(size: int) -> Tensor | None:
    """A matrix of ±1 [size, size] with orthogonal rows, float64; None where this construction has none.

    Sylvester's doubling of a matrix of 1, 2 or of Paley's: of size q + 1 or 2 (q + 1) for a prime q that leaves 3, or 1, over 4.
    Sources: Sylvester 1867; Paley 1933, theorems 1 and 2.
    """
    if size == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    if size == 2:
        return torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    if size % 4:
        return None
    found = _paley(size)
    if found is None and (half := hadamard(size // 2)) is not None:
        found = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), half)
    return found


def _paley(size: int) -> Tensor | None:
    if _is_prime(size - 1) and (size - 1) % 4 == 3:
        skew = _bordered(size - 1)  # skew-symmetric
        return skew + torch.eye(size, dtype=torch.float64)
    half = size // 2
    if _is_prime(half - 1) and (half - 1) % 4 == 1:
        symmetric = _bordered(half - 1)
        one = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
        zero = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
        return torch.kron(symmetric, one) + torch.kron(torch.eye(half, dtype=torch.float64), zero)
    return None


def _bordered(q: int) -> Tensor:
    """Quadratic residues of differences mod q, with a row and a column of ones around [q + 1, q + 1]; 0 on the diagonal."""
    squares = {value * value % q for value in range(1, q)}
    legendre = torch.tensor([0.0] + [1.0 if value in squares else -1.0 for value in range(1, q)], dtype=torch.float64)
    places = torch.arange(q)
    found = torch.ones(q + 1, q + 1, dtype=torch.float64)
    found[1:, 1:] = legendre[(places[:, None] - places) % q]
    found[0, 0] = 0
    if q % 4 == 3:
        found[1:, 0] = -1
    return found


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, int(number**0.5) + 1))


def spreading(size: int, rng: torch.Generator) -> Tensor:
    """An orthogonal matrix [size, size], float64: Hadamard's with random signs of its columns; a random one where there is none."""
    matrix = hadamard(size)
    if matrix is None:
        found, upper = torch.linalg.qr(torch.randn(size, size, generator=rng, dtype=torch.float64))
        return found * upper.diagonal().sign()
    signs = torch.randint(0, 2, (size,), generator=rng, dtype=torch.float64).mul_(2).sub_(1)
    return matrix * signs / size**0.5


def walsh_hadamard(values: Tensor) -> Tensor:
    """H x for the vectors of the last dimension, of a size that is a power of two; H is Sylvester's matrix over the root of the size.

    H is symmetric and its own inverse, so that gradients pass through it by H once more, and nothing is kept for them.
    Raises ValueError for other sizes.
    """
    if (size := values.shape[-1]) & (size - 1) or not size:
        raise ValueError(f"The Walsh-Hadamard transform takes a power of two of values, and these are {size}.")
    found: Tensor = _WalshHadamard.apply(values)
    return found


class _WalshHadamard(torch.autograd.Function):
    @staticmethod
    def forward(_: Any, values: Tensor) -> Tensor:  # type: ignore[override]
        found, half = values, 1
        while half < values.shape[-1]:
            left, right = found.unflatten(-1, (-1, 2, half)).unbind(-2)
            found, half = torch.stack((left + right, left - right), -2).flatten(-3), 2 * half
        return found / values.shape[-1] ** 0.5

    @staticmethod
    def backward(_: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return walsh_hadamard(gradient)

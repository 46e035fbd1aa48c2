"""Residual stacks: W ≈ Σ_t C_t, where each term approximates what those before it leave over.

A term can be anything that a function fits to values and another decodes: signs with a scale, phases, signs times low rank. Where a
fit leaves no more than it was given (any that includes the least squares over its scale), ‖R_{t+1}‖ ≤ ‖R_t‖, and the first terms
alone are the stack of so many: what is stored can be read up to any of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

from torch import Tensor

Term = TypeVar("Term")


def stack(values: Tensor, terms: int, fit: Callable[[Tensor], Term], decode: Callable[[Term], Tensor]) -> list[Term]:
    """So many terms: R_0 = values, C_t = fit(R_t), R_{t+1} = R_t - decode(C_t)."""
    found, rest = [], values
    for _ in range(terms):
        found.append(fit(rest))
        rest = rest - decode(found[-1])
    return found


def total(terms: Iterable[Term], decode: Callable[[Term], Tensor]) -> Tensor:
    """Σ_t decode(C_t), of at least one term, from the first on."""
    first, *others = terms
    found = decode(first)
    for term in others:
        found = found + decode(term)
    return found

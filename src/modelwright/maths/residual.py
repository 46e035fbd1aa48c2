"""Residual stacks: W ≈ Σ_t C_t, where each term approximates what those before it leave over.

A term can be anything that a function fits to values and another decodes: signs with a scale, phases, signs times low rank. Where a
fit leaves no more than it was given (any that includes the least squares over its scale), ‖R_{t+1}‖ ≤ ‖R_t‖, and the first terms
alone are the stack of so many: what is stored can be read up to any of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

import torch
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


def left(values: Tensor, terms: Iterable[Term], decode: Callable[[Term], Tensor]) -> Tensor:
    """‖R_t‖² after each of the terms of a stack of these values, float64 [terms]."""
    rest, found = values, []
    for term in terms:
        rest = rest - decode(term)
        found.append(rest.double().square().sum())
    return torch.stack(found)


def universal_order(harm: Tensor) -> Tensor:
    """The place of each further term among those of several stacks, long [levels, stacks], 0 first; all reach a level before any the next.

    harm [levels, stacks]: what is lost when all have so many terms, 1 in the first level, and this stack alone has one more; less goes
    first, and of equals the first. What is not finite counts as the next level's value and the most of its own (BitStack, 2410.23918).
    """
    filled, after = harm.double().cpu().clone(), torch.zeros(harm.shape[1], dtype=torch.float64)
    for level in reversed(range(len(filled))):
        known = filled[level].isfinite()
        most = filled[level][known].max() if known.any() else filled.new_zeros(())
        filled[level] = after = torch.where(known, filled[level], after + most)
    ranks = filled.argsort(dim=1, stable=True).argsort(1)
    return ranks + harm.shape[1] * torch.arange(len(filled))[:, None]

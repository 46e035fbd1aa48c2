"""Search by selection: the best of a population have children, and these are settled on what is allowed."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def fittest(
    first: Tensor,
    cost: Callable[[Tensor], float],
    settled: Callable[[Tensor], Tensor],
    population: int,
    generations: int,
    spread: float,
    rng: torch.Generator,
) -> tuple[Tensor, float]:
    """The vector of least cost that is found, and its cost; never worse than `first` [n], which is in the first population.

    settled: the allowed vector nearest to one that is made. In each generation the better half of a population stays, and pairs
    of it have children: each entry is that of one parent, and half of the children get normal noise of deviation `spread`.
    """

    def noise() -> Tensor:
        return spread * torch.randn(len(first), generator=rng, dtype=first.dtype)

    members = [first] + [settled(first + noise()) for _ in range(population - 1)]
    rated = sorted(((cost(member), place, member) for place, member in enumerate(members)), key=lambda one: one[:2])
    for generation in range(generations):
        rated = rated[: max(population // 2, 1)]
        parents = [member for _, _, member in rated]
        for child in range(population - len(parents)):
            mother, father = (parents[int(torch.randint(len(parents), (), generator=rng))] for _ in range(2))
            made = torch.where(torch.rand(len(first), generator=rng) < 0.5, mother, father)
            made = settled(made + noise() if child % 2 == 0 else made)
            rated.append((cost(made), (generation + 1) * population + child, made))
        rated.sort(key=lambda one: one[:2])
    return rated[0][2], rated[0][0]

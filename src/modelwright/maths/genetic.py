"""Search by selection: the best of a population have children, and these are settled on what is allowed."""

from __future__ import annotations

from collections.abc import Callable, Sequence

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


def evolved(
    choices: Sequence[Sequence[int]],
    fitness: Callable[[tuple[int, ...]], float],
    settled: Callable[[tuple[int, ...]], tuple[int, ...]],
    population: int,
    generations: int,
    crossover: float,
    rng: torch.Generator,
) -> tuple[tuple[int, ...], list[float]]:
    """The genes, each one of its `choices`, of the greatest fitness that is found; and the greatest of each generation, the first too.

    settled: the allowed genes nearest to those that are made. In each generation pairs are drawn: with the chance `crossover` their
    children have the genes of one up to a place and of the other from there; else each child is a parent whose genes from a
    place on are drawn anew. The fittest of parents and children live on, none of them twice. Shi et al. 2022, arXiv:2208.07120.
    """

    def drawn(high: int) -> int:
        return int(torch.randint(high, (), generator=rng))

    def anew(start: tuple[int, ...]) -> tuple[int, ...]:
        return start + tuple(each[drawn(len(each))] for each in choices[len(start) :])

    rated: dict[tuple[int, ...], float] = {}

    def add(genes: tuple[int, ...]) -> None:
        genes = settled(genes)
        if genes not in rated:
            rated[genes] = fitness(genes)

    for _ in range(population):
        add(anew(()))
    history = [max(rated.values())]
    for _ in range(generations):
        parents = list(rated)
        for _ in range(population // 2):
            pair = [parents[drawn(len(parents))] for _ in range(2)]
            if float(torch.rand((), generator=rng)) < crossover:
                place = drawn(len(choices) - 1) + 1 if len(choices) > 1 else 0
                add(pair[0][:place] + pair[1][place:])
                add(pair[1][:place] + pair[0][place:])
            else:
                for genes in pair:
                    add(anew(genes[: drawn(len(choices))]))
        rated = dict(sorted(rated.items(), key=lambda one: (-one[1], one[0]))[:population])
        history.append(max(rated.values()))
    return max(rated, key=lambda genes: (rated[genes], genes)), history

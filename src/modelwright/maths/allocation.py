"""How many of each group go: budgets for the whole turned into what stays of each part."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def keep_highest(score: Tensor, share: float) -> list[int]:
    """The places that stay of scores [n] when the floor(share · n) lowest go, but never all; of equals the first go."""
    gone = min(int(share * len(score)), len(score) - 1)
    return sorted(score.argsort(stable=True)[gone:].tolist())


def keep_highest_of_all(scores: Sequence[Tensor], costs: Sequence[float], share: float) -> list[list[int]]:
    """What stays of each group of scores [n] when the lowest of all groups go, until they cost `share` of the whole.

    costs: of one unit of each group. A unit that would go beyond the share is passed over, and cheaper ones after it may
    still go. Units of infinite score stay, and of every group the highest.
    """
    sizes = [len(score) for score in scores]
    groups = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    places = torch.cat([torch.arange(size) for size in sizes])
    values = torch.cat([score.double().cpu() for score in scores])
    values[torch.tensor([sum(sizes[:number]) + int(score.argmax()) for number, score in enumerate(scores)])] = torch.inf
    left = share * sum(cost * size for cost, size in zip(costs, sizes, strict=True)) * (1 + 1e-12)
    stays = torch.ones(len(values), dtype=torch.bool)
    for unit in values.argsort(stable=True)[: int(values.isfinite().sum())].tolist():
        cost = costs[int(groups[unit])]
        if cost <= left:
            stays[unit] = False
            left -= cost
    return [places[stays & (groups == number)].tolist() for number in range(len(sizes))]


def keep_by_harm(harm: Tensor, costs: Tensor, whole: Sequence[float], budget: float) -> list[int | None]:
    """For each group the place of the share that it keeps, None for all of it: as little harm as meets the budget (ASVD).

    harm [groups, shares]: to the whole when one group alone is cut to a share. costs [groups, shares]: what the group then
    costs. whole: what each costs uncut. Every cut whose harm is below one threshold is made, each group's cheapest; the
    threshold is the lowest that meets the budget, or the highest when none does.
    """
    order = harm.flatten().argsort(stable=True).tolist()
    shares = harm.shape[1]

    def chosen(number: int) -> list[int | None]:
        places: list[int | None] = [None] * len(whole)
        for entry in order[:number]:
            group, place = divmod(entry, shares)
            best = places[group]
            before = whole[group] if best is None else float(costs[group, best])
            if float(costs[group, place]) < before:
                places[group] = place
        return places

    def total(places: list[int | None]) -> float:
        return sum(whole[group] if place is None else float(costs[group, place]) for group, place in enumerate(places))

    low, high = 0, len(order)
    while low < high:
        middle = (low + high) // 2
        if total(chosen(middle)) > budget:
            low = middle + 1
        else:
            high = middle
    return chosen(low)


def standardised(score: Tensor) -> Tensor:
    """Scores of any shape with mean 0 and variance 1, so that groups of other sizes compete; 0 where all are equal."""
    centred = score.double() - score.double().mean()
    deviation = centred.std() if centred.numel() > 1 else centred.sum()
    return centred / deviation if deviation > 0 else centred

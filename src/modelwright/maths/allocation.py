"""How many of each group go: budgets for the whole turned into what stays of each part."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from modelwright.maths.masks import part_of


def keep_highest(score: Tensor, share: float) -> list[int]:
    """The places that stay of scores [n] when the floor(share · n) lowest go, but never all; of equals the first go."""
    gone = min(part_of(share, len(score)), len(score) - 1)
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


def least_harm(harm: Tensor, costs: Tensor, budget: float) -> list[int]:
    """For each item the place of its option, so that the options' costs together are at most the budget and their harm is small.

    harm, costs: [items, options]. Options that minimise harm + λ · cost, with the least λ that meets the budget; then, while it
    lasts, one after another the change that takes away most harm for what it costs.

    Raises ValueError when the cheapest options cost more than the budget.
    """
    harm, costs, items = harm.double().nan_to_num(nan=torch.inf), costs.double(), torch.arange(len(harm))

    def spent(chosen: Tensor) -> float:
        return float(costs[items, chosen].sum())

    cheapest = costs.argmin(1)
    if spent(cheapest) > budget:
        raise ValueError(f"the cheapest options cost {spent(cheapest):g}, above the budget of {budget:g}")
    slopes = (harm[:, :, None] - harm[:, None, :]) / (costs[:, None, :] - costs[:, :, None])  # at which two options are equally good
    at = slopes[slopes.isfinite() & (slopes > 0)].unique()  # rising
    low, high, best = 0, len(at), cheapest
    while low <= high:
        middle = (low + high) // 2
        price = 0.0 if middle == 0 else float(at[middle - 1]) * (1 + 1e-9)
        chosen = (harm + price * costs).argmin(1)
        if spent(chosen) <= budget:
            best, high = chosen, middle - 1
        else:
            low = middle + 1
    while True:
        gain = harm[items, best][:, None] - harm
        more = costs - costs[items, best][:, None]
        open_ = (gain > 0) & (more > 0) & (more <= budget - spent(best))
        if not open_.any():
            return best.tolist()
        item, option = divmod(int(torch.where(open_, gain / more.clamp(min=1e-300), 0).argmax()), harm.shape[1])
        best[item] = option


def standardised(score: Tensor) -> Tensor:
    """Scores of any shape with mean 0 and variance 1, so that groups of other sizes compete; 0 where all are equal."""
    centred = score.double() - score.double().mean()
    deviation = centred.std() if centred.numel() > 1 else centred.sum()
    return centred / deviation if deviation > 0 else centred


def erk(shapes: Sequence[tuple[int, int]], keep: float) -> list[float]:
    """The share kept of each matrix [out, in], proportional to (in + out) / (in · out), at most 1; ERK without kernels.

    keep: of all entries together, which the result keeps exactly. Evci et al. 2020, arXiv:1911.11134, section 3.
    """
    sizes = torch.tensor([rows * columns for rows, columns in shapes], dtype=torch.float64)
    density = torch.tensor([rows + columns for rows, columns in shapes], dtype=torch.float64) / sizes
    whole = torch.zeros(len(sizes), dtype=torch.bool)
    wanted = keep * sizes.sum()
    while True:
        scale = (wanted - sizes[whole].sum()) / (sizes * density)[~whole].sum().clamp_min(1e-300)
        over = ~whole & (scale * density > 1)
        if not over.any():
            return torch.where(whole, 1.0, scale * density).tolist()
        whole |= over


def even(sizes: Sequence[int], keep: float) -> list[float]:
    """The share kept of each part: as many entries of each, whole where it has fewer; `keep` of all entries together.

    It is the p that maximises Σ log p under Σ p · size = keep · Σ size and p ≤ 1: min(1, ν / size), filled up like water.
    SynFlow in expectation, Cai et al. 2022, arXiv:2203.02549.
    """
    wanted, level = keep * sum(sizes), 0.0
    for place, size in enumerate(ordered := sorted(sizes)):
        level = wanted / (len(ordered) - place)
        if level <= size:
            break
        wanted -= size
    return [min(1.0, level / size) for size in sizes]


def outliers(scores: Sequence[Tensor], times: float) -> float:
    """Of all entries of these scores together, the percentage above `times` their mean: D of OWL, arXiv:2310.05175."""
    count = sum(score.numel() for score in scores)
    mean = sum(float(score.sum(dtype=torch.float64)) for score in scores) / max(count, 1)
    return 100 * sum(int((score > times * mean).sum()) for score in scores) / max(count, 1)


def owl(found: Sequence[float], sizes: Sequence[int], keep: float, spread: float) -> list[float]:
    """The share kept of each block by its outliers: 2 · spread from the fewest to the most, on a straight line.

    found: `outliers` of each block. sizes: its entries, which weigh the mean. keep: of all entries together, which the
    result keeps exactly; all of it lies within 2 · spread of `keep`, and from 0 to 1. Blocks that are alike get the same.
    """
    values = torch.tensor(found, dtype=torch.float64)
    reach = values.max() - values.min()
    raised = 2 * spread * (values - values.min()) / reach if reach > 0 else torch.zeros_like(values)
    return moved_to_mean(raised, torch.tensor(sizes, dtype=torch.float64), keep).tolist()


def owl_counts(found: Sequence[float], sizes: Sequence[int], pattern: tuple[int, int], spread: float) -> list[int]:
    """How many of every m entries each block keeps, 1 to m: the shares of `owl` in whole numbers, for a pattern (n, m).

    All are rounded down; then those that lost most by that go up, as long as the mean, weighted by `sizes`, is not above n. Of
    blocks of one size it is n exactly.
    """
    keep, of = pattern
    if keep == of:
        return [of] * len(found)
    shares = owl(found, sizes, (keep - 1) / (of - 1), spread * of / (of - 1))  # of what may go
    wanted = [1 + (of - 1) * share for share in shares]
    counts = [int(value + 1e-9) for value in wanted]
    left = keep * sum(sizes) - sum(count * size for count, size in zip(counts, sizes, strict=True))
    for place in sorted(range(len(sizes)), key=lambda place: counts[place] - wanted[place]):
        if counts[place] < wanted[place] - 1e-9 and sizes[place] <= left:
            counts[place] += 1
            left -= sizes[place]
    return counts


def moved_to_mean(values: Tensor, sizes: Tensor, mean: float) -> Tensor:
    """values [n] + c, cut to 0 and 1, with the c for which their mean, weighted by `sizes` [n], is `mean`; float64."""
    low, high = -float(values.max()), 1 - float(values.min())  # all 0, all 1

    def over(shift: float) -> float:
        return float(((values + shift).clamp(0, 1) * sizes).sum() / sizes.sum()) - mean

    shift = mean - float((values * sizes).sum() / sizes.sum())
    if not (values + shift >= 0).all() or not (values + shift <= 1).all():
        for _ in range(200):
            shift = (low + high) / 2
            low, high = (low, shift) if over(shift) > 0 else (shift, high)
    return (values + shift).clamp(0, 1)

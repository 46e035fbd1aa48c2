"""Weigh every entry of every donor by its importance and by how far the others agree: PCB-Merging.

Du et al. 2024, arXiv:2410.02396, section 3.2, as in the authors' code: sizes |τᵢ| are brought between their quantiles c and
1 - c and then to ν from 0 to 1; importance exp(N·νᵢ²) times agreement Σⱼ tanh(τ̂ᵢτ̂ⱼ), τ̂ = sign(τ)·ν, is the balance b; what is below its
quantile 1 - r goes and the rest is brought to s from 0 to 1; the merged change is Σ λᵢ s_i τᵢ / Σ s_i. `clamp` c, `keep` r.
The authors search λᵢ from 0.8 to 1.3 in 100 trials: `merge.evolve` with `method: merge.pcb, lowest: 0.8, highest: 1.3, trials: 100`.
Differs: λᵢ is `scale` times the donor's weight; `agreement` offers the forms of the authors' scripts: tanh(τ̂ᵢ·Σ τ̂ⱼ)
(summed) and tanh(τᵢ·Σ τⱼ) (raw). Where all sizes are equal ν is 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from modelwright.core.settings import fraction, number
from modelwright.maths.masks import find_cut, quantiles
from modelwright.maths.slices import Entries, Sliced, Values, each, flat
from modelwright.maths.task_vectors import changes, onto
from modelwright.methods.merge._mechanism import Merger


class Ends(NamedTuple):
    """Of one donor: between which its sizes |τ| lie, and its balances b."""

    sizes: tuple[float, float]
    balances: tuple[float, float] = (0.0, 1.0)


@dataclass(frozen=True, kw_only=True)
class Pcb(Merger):
    """Add a mean of the donors' changes at each entry, weighted by parameter competition; needs no search for a scale."""

    status: ClassVar[str] = "checked"
    on_changes: ClassVar[bool] = True
    base_apart: ClassVar[bool] = True
    neutral = dict(scale=0.0)
    unsurveyed: ClassVar[frozenset[str]] = frozenset({"weights", "scale"})

    scale: float = number(1.0)  # of the merged change, λ
    keep: float = fraction(0.1)  # of each donor's changes, r
    clamp: float = fraction(0.01, high=0.49)  # of the smallest and of the largest sizes, brought to the next, c
    agreement: Literal["pairwise", "summed", "raw"] = "pairwise"  # of the donors' changes
    scope: Literal["model", "tensor"] = "model"  # in which importance is compared

    def problems(self) -> list[str]:
        return self.everywhere("keep", "clamp") if self.scope == "model" else []

    def survey(self, weight: Entries, donors: list[Entries]) -> list[Ends] | None:
        """Where each donor's sizes and balances end, when all tensors compete."""
        return self.ends(weight, donors) if self.scope == "model" else None

    def tensor(self, weight: Entries, donors: list[Entries], survey: list[Ends] | None) -> Sliced:
        if not math.prod(weight.shape):
            return Sliced(tuple(weight.shape), weight.dtype, flat(weight))
        ends = survey or self.ends(weight, donors)
        whole, weights = changes(weight, donors), torch.tensor(self.weights_for(len(donors))).double()[:, None]

        def merged(at: slice) -> Tensor:
            parts = stacked(whole, at)
            scores = torch.stack([within(self.balance(parts, ends, number), one.balances) for number, one in enumerate(ends)])
            sizes = torch.stack([part.abs().clamp(*one.sizes) for part, one in zip(parts, ends, strict=True)])
            total = (weights.to(parts.device) * scores * sizes * parts.sign()).sum(0)
            return total.div_(scores.sum(0).clamp_(min=1e-12))

        return onto(weight, merged, self.scale)

    def ends(self, weight: Entries, donors: list[Entries]) -> list[Ends]:
        """Where each donor's sizes and balances end."""
        count, whole = math.prod(weight.shape), changes(weight, donors)
        ends = []
        for one in whole:
            low, high = quantiles(absolute(one), count, (self.clamp, 1 - self.clamp))
            ends.append(Ends((low, high)))
        dropped = max(count - int(self.keep * count), 1)

        def balances(number: int) -> tuple[float, float]:
            def values(at: slice) -> Tensor:
                return self.balance(stacked(whole, at), ends, number)

            return find_cut(values, count, dropped).value, max(each(lambda at: values(at).max().item(), count))

        return [one._replace(balances=balances(number)) for number, one in enumerate(ends)]

    def balance(self, parts: Tensor, ends: Sequence[Ends], number: int) -> Tensor:
        """Importance times agreement of one donor's changes; parts [donors, n] -> [n]."""
        levels = torch.stack([within(part.abs(), one.sizes) for part, one in zip(parts, ends, strict=True)])
        compared = parts if self.agreement == "raw" else parts.sign() * levels
        if self.agreement == "pairwise":
            agreement = torch.tanh(compared * compared[number]).sum(0)
        else:
            agreement = torch.tanh(compared[number] * compared.sum(0))
        return torch.exp(len(parts) * levels[number].square()) * agreement


def stacked(whole: list[Values], at: slice) -> Tensor:
    return torch.stack([part(at) for part in whole]).double()


def absolute(values: Values) -> Values:
    return lambda at: values(at).abs()


def within(values: Tensor, ends: tuple[float, float]) -> Tensor:
    """Values brought between two ends, and then to 0 and 1; 0 where the ends are one."""
    low, high = ends
    return values.clamp(low, high).sub_(low).div_(high - low) if high > low else torch.zeros_like(values)

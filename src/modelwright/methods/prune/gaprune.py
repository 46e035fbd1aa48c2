"""Zero the weights that a domain needs least: Fisher information of its text against general text, with gradient alignment.

Tang, Yang 2025, GAPrune, arXiv:2509.10844, section 3. With F the mean over examples of g², the score of a weight is
(F_domain·|w| - β·F_general·|w|) · clamp(1 + 0.2·a, 0.8, 1.2) + γ·√|w|, where a is the product of the two mean gradients,
each of length 1 in its tensor, averaged over 3 × 3 neighbours.
Differs: the loss is that of the next token, which every causal model has, and not InfoNCE over triplets. The mean product of
unit gradients is about 1 over the entries, so a is multiplied by their number. As Fisher terms are many orders below √|w|,
each of the two summands is divided by its deviation in its tensor (`scales: standard`); `published` adds them as printed.
Their softplus, which changes no order, is left out, and so is the retraining: put `train` after it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from modelwright.anatomy import Site
from modelwright.core.gradients import gradient_moments
from modelwright.core.model import Model, unwrapped, weight_of
from modelwright.core.settings import number
from modelwright.methods.prune._mechanism import ModelPruner

SMALLEST = 1e-8  # added to Fisher information


@dataclass(frozen=True, kw_only=True)
class GaPrune(ModelPruner):
    """Zero `sparsity` of the weights, keeping what the data's domain needs more than general text does."""

    status: ClassVar[str] = "checked"
    causal: ClassVar[bool] = True
    neutral = dict(sparsity=0.0)
    reads: ClassVar[tuple[str, ...]] = ("general",)

    general: str = "corpus"  # text that is not of the domain; the domain is the recipe's data
    against: float = number(1.0, low=0)  # β, how much general Fisher information counts against the domain's
    size: float = number(0.5, low=0)  # γ, how much √|w| counts
    alignment: float = number(0.2, low=0)  # how much agreeing gradients raise, and opposed ones lower, the Fisher terms
    scales: Literal["standard", "published"] = "standard"  # terms by their deviation in each tensor; or as they are

    def model(self, model: Model, calibration: Sequence[Any], notes: list[str]) -> Model:
        return self.pruned(model, calibration, notes)

    def scores(self, model: Model, sites: Sequence[Site], calibration: Sequence[Any], notes: list[str]) -> list[Tensor]:
        (domain, domain_square), (general, general_square) = (gradient_moments(model, batches) for batches in calibration)
        found, parts = [], torch.zeros(2, dtype=torch.float64)
        for site in sites:
            weight = weight_of(unwrapped(model.module), site)
            assert weight is not None
            seen = [each[site.name] for each in (domain, general, domain_square, general_square)]
            fisher, size = self.terms(weight.detach().float(), *(each.T if site.transposed else each for each in seen))
            parts += torch.stack([fisher.double().std(correction=0), size.double().std(correction=0)]).cpu()
            found.append(fisher + size)
        share = parts / parts.sum().clamp_min(1e-300)
        notes.append(f"{self.name()}: of the deviation of scores, {share[0]:.1%} is of Fisher information and {share[1]:.1%} of size")
        return found

    def terms(
        self, weight: Tensor, domain: Tensor, general: Tensor, domain_square: Tensor, general_square: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The two summands of the score, like the weight; by mean gradients and mean squares of gradients."""
        fisher = (domain_square + SMALLEST - self.against * (general_square + SMALLEST)) * weight.abs()
        fisher = fisher * (1 + self.alignment * aligned(domain, general)).clamp(0.8, 1.2)
        size = weight.abs().sqrt()
        if self.scales == "standard":
            fisher, size = (term / deviation if (deviation := term.std(correction=0)) > 0 else term for term in (fisher, size))
        return fisher, self.size * size


def aligned(one: Tensor, other: Tensor) -> Tensor:
    """The product of two gradients of one tensor, each brought to a mean square of 1; of matrices, averaged over 3 × 3 entries."""
    product = one * other / (one.norm() * other.norm()).clamp_min(torch.finfo(torch.float32).tiny) * one.numel()
    if product.ndim != 2:
        return product
    return torch.nn.functional.avg_pool2d(product[None], 3, stride=1, padding=1, count_include_pad=False)[0]

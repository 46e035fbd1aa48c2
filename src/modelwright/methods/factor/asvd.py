"""Keep the singular values that matter for large inputs, and of each matrix as much as perplexity asks for: ASVD.

Yuan, Shang, Song, Wu, Yan, Sun 2023, arXiv:2312.05821, sections 3.2 and 3.3. S is diagonal, to a `power`: of each input the mean of
|x|, its largest, or by the loss's gradients g the root of the mean of g² over the column's weights and all sequences (Fisher).
With `allocate: perplexity` every matrix is cut alone to each of `keeps`; the cuts of least perplexity are made until the chosen
matrices together hold `keep` of their parameters; a matrix that no cut is made of stays as it is.
Differs: the search ends at the first cut that meets the budget, where the authors' code takes the one it tried last. Shares come
from the exact decomposition. The product of Fisher information and |x| and the factored cache of keys and values are left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from modelwright.anatomy import Site, anatomy_of
from modelwright.core.errors import PlanError, SiteError
from modelwright.core.given import Batch, first
from modelwright.core.gradients import input_fisher, text_loss
from modelwright.core.method import ModelMethod
from modelwright.core.model import Model, put, unwrapped, weight_of
from modelwright.core.passage import statistics_of
from modelwright.core.progress import track
from modelwright.core.settings import count, number
from modelwright.core.statistics import Statistics
from modelwright.core.walk import Chosen, alike, choose, dense_sites, split_experts
from modelwright.maths import low_rank
from modelwright.maths.allocation import keep_by_harm
from modelwright.methods.factor._mechanism import Factoriser


@dataclass(frozen=True, kw_only=True)
class Asvd(Factoriser, ModelMethod):  # type: ignore[misc]  # sizes are planned matrix by matrix
    """Replace matrices by two factors under the size of their inputs, each cut as deep as the text's perplexity allows."""

    status: ClassVar[str] = "checked"
    neutral = dict(keep=1.0)
    small = dict(allocate="uniform")

    power: float = number(0.5, low=0)  # of the size of an input, by which its column counts
    measure: Literal["mean", "largest", "fisher"] = "mean"  # of an input's absolute values; or its Fisher information, by gradients
    allocate: Literal["uniform", "perplexity"] = "perplexity"  # all matrices keep the same share, or what perplexity asks for
    keeps: tuple[float, ...] = (0.4, 0.5, 0.6, 0.7, 0.8, 0.9)  # the shares that are tried of each matrix
    tries: int = count(32, unit="sequences")  # of the text, on which the perplexity is taken

    def problems(self) -> list[str]:
        wrong = []
        if not self.keeps or not all(0 < keep < 1 for keep in self.keeps):
            wrong.append(f"keeps are shares between 0 and 1; got {list(self.keeps)}.")
        if self.allocate == "perplexity" and (self.rank is not None or not isinstance(self.keep, float)):
            wrong.append("with allocate: perplexity, keep is one number for all matrices and rank is free. Use allocate: uniform.")
        return wrong

    def metric(self, statistics: Statistics) -> Tensor:
        return (statistics.absolute if self.measure == "mean" else statistics.largest).double() ** self.power

    def model(self, model: Model, calibration: Sequence[Batch], notes: list[str]) -> Model:
        module = unwrapped(model.module)
        with torch.no_grad(), split_experts(module):
            sites = [site for site in anatomy_of(module).sites(module) if site.role not in ("embed", "position")]
            chosen = dense_sites(module, self, choose(module, sites, self, notes), notes)
            metrics = self.metrics(model, [site for site, _ in chosen], calibration)
            known: list[tuple[Tensor, Tensor] | None] = [None] * len(chosen)
            if self.allocate == "perplexity" and self.keep < 1:
                chosen, known = self.allocated(model, chosen, metrics, first(calibration, self.tries), notes)
            for (site, local), metric, factors in zip(chosen, metrics, known, strict=True):
                weight = weight_of(module, site)
                assert weight is not None, site
                put(module, site, local.factored(weight, metric, factors))
        return model

    def metrics(self, model: Model, sites: Sequence[Site], calibration: Sequence[Batch]) -> list[Tensor]:
        """S of each site, a diagonal [in]; 1 for an expert that no token reaches.

        Raises:
            SiteError: one is NaN or infinite.
        """
        if self.measure == "fisher":
            found = input_fisher(model, sites, calibration)
            metrics = [(each if each.any() else torch.ones_like(each)).double() ** self.power for each in found]
        else:
            gathers = ("absolute",) if self.measure == "mean" else ("largest",)
            found_of = statistics_of(model, sites, gathers, calibration)
            seen = [found_of[site.name] for site in sites]
            metrics = [self.metric(each if each.tokens else alike(each, gathers)) for each in seen]
        if bad := [site.name for site, metric in zip(sites, metrics, strict=True) if not metric.isfinite().all()]:
            what = "gradients" if self.measure == "fisher" else "inputs"
            raise SiteError(f"{self.name()}: the {what} of {bad[0]} are NaN or infinite on the text. Use a wider dtype, or other text.")
        return metrics

    def passes(self, blocks: int) -> float:
        once = 4 if self.measure == "fisher" else 2
        return once if self.allocate == "uniform" else once + 7 * blocks * len(self.keeps)  # of the matrices of a block, seven as a rule

    def allocated(
        self, model: Model, chosen: Chosen, metrics: list[Tensor], calibration: Sequence[Batch], notes: list[str]
    ) -> tuple[Chosen, list[tuple[Tensor, Tensor] | None]]:
        """The sites, each with a `keep` of its own that together meet this one's, and their factors at the highest rank that was tried."""
        module = unwrapped(model.module)
        weights: list[Any] = [weight_of(module, site) for site, _ in chosen]
        whole = [weight.numel() for weight in weights]
        ranks = [[replace(local, keep=keep).rank_of(tuple(weight.shape)) for keep in self.keeps]
                 for (_, local), weight in zip(chosen, weights, strict=True)]  # fmt: skip
        costs = torch.tensor([[weight.numel() if rank is None else rank * sum(weight.shape) for rank in row]
                              for row, weight in zip(ranks, weights, strict=True)], dtype=torch.float64)  # fmt: skip
        if (least := float(costs.min(1).values.sum())) > self.keep * sum(whole):
            held = f"keeps of {min(self.keeps):g} hold {least / sum(whole):.3f}"
            raise PlanError(f"{self.name()}: keep={self.keep:g} was asked for, and {held}. Add lower ones.")
        harm = torch.full_like(costs, text_loss(model, calibration))
        known: list[tuple[Tensor, Tensor] | None] = [None] * len(chosen)
        for row, ((site, _), metric) in enumerate(zip(track(chosen, self.name()), metrics, strict=True)):
            tried = [rank for rank in ranks[row] if rank is not None]  # else nothing would change
            if not tried:
                continue
            before = weights[row].clone()
            tall, wide = low_rank.factor(before.double(), max(tried), metric)
            try:
                for place, rank in enumerate(ranks[row]):
                    if rank is not None:
                        put(module, site, (tall[:, :rank] @ wide[:rank]).to(before.dtype))
                        harm[row, place] = text_loss(model, calibration)
            finally:
                put(module, site, before)
            kind = before.dtype if self.store == "factors" else torch.promote_types(before.dtype, torch.float32)  # to round once
            known[row] = tall.to(kind), wide.to(kind)
        places = keep_by_harm(harm, costs, whole, self.keep * sum(whole))
        kept = sum(size if place is None else float(row[place]) for size, place, row in zip(whole, places, costs, strict=True))
        shares = [1.0 if place is None else self.keeps[place] for place in places]
        shown = ", ".join(f"{site.role} {site.depth} {share:g}" for (site, _), share in zip(chosen, shares, strict=True))
        notes.append(f"{self.name()} keeps {kept / sum(whole):.4f} of these matrices' parameters: {shown}")
        return [(site, replace(local, keep=share)) for (site, local), share in zip(chosen, shares, strict=True)], known

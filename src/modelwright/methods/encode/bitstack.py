"""Store matrices as sums of signed thin products, in one order for all, so that any budget of bytes takes a prefix: BitStack.

Wang et al. 2024, arXiv:2410.23918, section 3: inputs are divided by c, the mean over sequences of each channel's L2 norm, plus 1e-3, and
matrices multiplied; W ≈ Σ_t S_t ⊙ (A_t B_t), each term the signs of what the terms before leave, and the best product of `rank` for its
sizes. Further terms are sorted, level by level, by the perplexity when one matrix alone has one more; `modelwright.resize` loads a prefix.
Differs: what a term leaves is computed with its factors as they are stored, in float16, where the authors take them unrounded. c is over
the power of 4 nearest to its geometric mean, which scales factors alone, by a power of 2. Sums are in float32, decompositions in float64;
a folded weight is rounded to its own dtype. Inputs of o are scaled where every head has its own v; experts stay unscaled but by the norm.
`measure` error is ours.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from modelwright.anatomy import _folding as folding
from modelwright.anatomy import anatomy_of
from modelwright.blocks.bit_stack import BitStackLinear
from modelwright.blocks.experts import split_experts
from modelwright.core import resizing, walk
from modelwright.core.budget import Budget
from modelwright.core.errors import PlanError, SiteError, refuse
from modelwright.core.given import Batch, first
from modelwright.core.gradients import text_loss
from modelwright.core.method import ModelMethod, Places, Rescales
from modelwright.core.model import Model, emptied, put, stored_bytes, unwrapped, weight_of, why_not_stored
from modelwright.core.passage import Resident, statistics_of
from modelwright.core.progress import track
from modelwright.core.settings import count
from modelwright.core.statistics import Statistics
from modelwright.maths import residual, signed_low_rank
from modelwright.maths.signed_low_rank import Signed

LEAST = 1e-3  # that is added to each channel's norm


@dataclass(frozen=True, kw_only=True)
class Bitstack(ModelMethod, Rescales):
    """Store a model of which any number of bytes can be loaded: each matrix is a sum of terms of about a bit for each weight."""

    status: ClassVar[str] = "checked"
    causal: ClassVar[bool] = True
    sites: ClassVar[tuple[str, ...]] = ("attn", "mlp", "experts", "linear")
    leaves: ClassVar[frozenset[str]] = frozenset({"packed"})
    drops: ClassVar[frozenset[str]] = frozenset({"float", "sparse"})
    small = dict(terms=2, rank=4, tries=2)

    terms: int = count(16)  # of each matrix, each of which stores what those before leave over
    rank: int = count(16)  # of the product in each term
    measure: Literal["perplexity", "error"] = "perplexity"  # by which terms are sorted; error, of the weights, takes no time
    tries: int = count(32, unit="sequences")  # of the text, on which the perplexity is taken
    budget: str | None = None  # of all tensors, such as 40% of the model, 300MB or 2x smaller; further terms are not stored then
    where: Places = None  # roles to work on; by default the matrices of the blocks
    skip: Places = None  # roles to leave alone

    def problems(self) -> list[str]:
        try:
            Budget.parse(self.budget or "1B", 1 << 40)
        except PlanError as error:
            return [f"budget: {error}"]
        return []

    @torch.no_grad()
    def model(self, model: Model, calibration: Sequence[Batch], notes: list[str]) -> Model:
        module = unwrapped(model.module)
        self.planned(emptied(module), 0)  # what is refused is refused before anything changes
        before = stored_bytes(module)
        with walk.split_experts(module):
            chosen = self.chosen(module, notes)
            self.scale(model, chosen, calibration, notes)
            weights: list[Any] = [weight_of(module, site) for site, _ in chosen]
            stacks = [self.stack(weight) for weight in track(weights, f"{self.name()}: terms")]
            if self.measure == "error":
                left = [residual.left(weight.float(), stack, signed_low_rank.decode) for weight, stack in zip(weights, stacks, strict=True)]
                harm = torch.stack(left, 1).diff(dim=0)
            else:
                harm = self.harm(weights, stacks, lambda: text_loss(model, first(calibration, self.tries)))
            order = residual.universal_order(harm).T.tolist()
            for (site, _), weight, stack, places in zip(chosen, weights, stacks, order, strict=True):
                put(module, site, BitStackLinear.of(stack, places, weight.dtype))
        least, most = resizing.sizes(module, resizing.stacks(module))
        if self.budget is not None:
            resizing.shorten(module, self.budget, before)
        notes.append(f"{self.name()}: {len(chosen)} matrices; {least:,} bytes by one term of each, {most:,} by all; {before:,} before")
        return model

    def chosen(self, module: nn.Module, notes: list[str]) -> walk.Chosen:
        """The dense matrices to work on. Raises SiteError when there is none, or one cannot be stored so."""
        sites = [site for site in anatomy_of(module).sites(module) if site.role not in ("embed", "position")]
        chosen = walk.dense_sites(module, self, walk.choose(module, sites, self, notes), notes)
        if not chosen:
            raise SiteError(f"{self.name()}: all chosen matrices are stored otherwise than dense. Choose others with `where`.")
        whys = [(site.name, why_not_stored(module, site, self.empty(weight_of(module, site), 0, 1))) for site, _ in chosen]
        refuse(SiteError, [f"{self.name()}: {name} {why}." for name, why in whys if why])
        return chosen

    def scale(self, model: Model, chosen: walk.Chosen, calibration: Sequence[Batch], notes: list[str]) -> None:
        """Multiply the chosen matrices' inputs by c, and divide what makes them."""
        statistics = statistics_of(model, [site for site, _ in chosen], ("sequence",), calibration)
        for site, _ in chosen:
            walk.refuse_not_finite(site, statistics[site.name], self)
        walk.rescale(Resident(model), chosen, statistics, folding.folds(unwrapped(model.module)), notes)

    def rescale(self, kind: str, readers: Any, statistics: Statistics, harm: Callable[[Sequence[Tensor]], float]) -> Tensor:
        """c [in], over a power of 4."""
        found = statistics.sequence + LEAST
        return found / 4.0 ** round(float(found.log2().mean()) / 2)

    def stack(self, weight: Tensor) -> list[Signed]:
        """The terms of a weight [out, in]."""
        rank = min(self.rank, *weight.shape)
        return residual.stack(weight.float(), self.terms, lambda rest: signed_low_rank.fit(rest, rank), signed_low_rank.decode)

    def harm(self, weights: Sequence[Tensor], stacks: Sequence[list[Signed]], loss: Callable[[], float]) -> Tensor:
        """The perplexity when all matrices have 1, 2, ... terms and one alone has one more [terms - 1, matrices].

        weights: of the model, in which `loss` finds them; they become what all terms but the last stand for.
        """
        harm = torch.zeros(self.terms - 1, len(stacks), dtype=torch.float64)
        held = [torch.zeros_like(weight, dtype=torch.float32) for weight in weights]
        for level, row in enumerate(track(list(harm), f"{self.name()}: order")):
            for weight, value, stack in zip(weights, held, stacks, strict=True):
                weight.copy_(value.add_(signed_low_rank.decode(stack[level])))
            for number, stack in enumerate(stacks):
                weights[number].copy_(held[number] + signed_low_rank.decode(stack[level + 1]))
                row[number] = loss()
                weights[number].copy_(held[number])
        return harm.exp()

    def empty(self, weight: Any, number: int, matrices: int) -> BitStackLinear:
        """The layer of a weight without its values, its terms in the places of this one among so many matrices."""
        places = [number + level * matrices for level in range(self.terms - 1)]
        return BitStackLinear(*weight.shape[:2], rank=min(self.rank, *weight.shape[:2]), places=places, dtype=weight.dtype, device="meta")

    def planned(self, module: Any, donors: int) -> Any:
        """With terms in the order of the matrices, which is another one than is found."""
        before = stored_bytes(module)
        split_experts(module)
        chosen = self.chosen(module, [])
        for number, (site, _) in enumerate(chosen):
            put(module, site, self.empty(weight_of(module, site), number, len(chosen)))
        if self.budget is not None:
            resizing.shorten(module, self.budget, before)
        return module

    def passes(self, blocks: int) -> float:
        return 2 + (7 * blocks * (self.terms - 1) if self.measure == "perplexity" else 0)  # of the matrices of a block, seven as a rule

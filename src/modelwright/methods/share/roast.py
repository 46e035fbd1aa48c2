"""Read all weights of the model from one array of stored values by a fixed random map: ROAST and STABLE-RPS.

Desai, Shrivastava 2023, arXiv:2310.11611. W[i] = λ · s(i) · ψ[h(i)], with signs s and places h from a hash of the weight's number in
the model: `pareto` (the paper's STABLE-RPS, where no two values of ψ are read by numbers of weights that differ by more than one),
`roast` (blocks of 32 × 32 weights), `hashednet` (each weight by itself). λ = σ √3 / c for a matrix of standard deviation σ, and
ψ begins uniform in ±c, c = 0.05, or as the least-squares fit to the trained weights.
Differs: one seed serves the whole array (the authors' code hashes with a seed for each module, so that loads are not even and a
full array is no bijection); λ has the √3 that gives a uniform ψ the weights' own deviation; only matrices of the blocks are
shared by default; places are computed at each use, where the code stores them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from modelwright.anatomy import Site, anatomy_of
from modelwright.blocks.experts import fuse_experts, split_experts
from modelwright.blocks.hashed import HashedLinear
from modelwright.core import walk
from modelwright.core.errors import LayoutError, PlanError, SiteError, refuse
from modelwright.core.method import ModelMethod, Places
from modelwright.core.model import Model, put, weight_of, why_not_stored
from modelwright.core.settings import count, fraction
from modelwright.core.sharing import tie
from modelwright.core.weights import not_finite
from modelwright.maths.hashing import EDGE, Form, Map, Scaling, projected

BOUND = 0.05  # c


@dataclass(frozen=True, kw_only=True)
class Roast(ModelMethod):
    """Share single values between all matrices: `keep` of them are stored. Made to be trained; a trained model needs much training."""

    status: ClassVar[str] = "checked"
    drops: ClassVar[frozenset[str]] = frozenset({"sparse"})
    sites: ClassVar[tuple[str, ...]] = ("attn", "mlp", "experts", "linear")

    keep: float = fraction(0.5)  # values that are stored, of the weights that read them
    kind: Form = "pareto"  # the map from weights to values
    scaling: Scaling = "projection"  # what the values' gradients are divided by
    initial: Literal["projected", "random"] = "projected"  # the values at first: fitted to the weights, or drawn
    scope: Literal["model", "tensor"] = "model"  # one array for all matrices, or one for each
    least: int = count(1, unit="weights")  # that a matrix must have to be shared
    where: Places = None  # roles that are shared; by default the matrices of the blocks
    skip: Places = None  # roles that are left as they are
    store: Literal["shared", "dense"] = "shared"  # dense: write the weights as they are read; saves nothing, loads anywhere

    def model(self, model: Model, seed: int, notes: list[str]) -> Model:
        shared, values = self.share(model.module, seed)
        notes.append(f"{self.name()}: {shared:,} weights are read from {values:,} values")
        return model

    @torch.no_grad()
    def share(self, module: nn.Module, seed: int) -> tuple[int, int]:
        """Share in place; returns how many weights are read, and from how many values."""
        if hasattr(module, "get_base_model"):
            raise PlanError(f"{self.name()}: the model bears adapters. Fold them first, or share before they are attached.")
        split_experts(module)
        try:
            sites, weights = self.chosen(module)
            groups = [range(len(sites))] if self.scope == "model" else [range(n, n + 1) for n in range(len(sites))]
            maps = self.mapped(weights, groups, seed)
        except (SiteError, PlanError):
            fuse_experts(module)
            raise
        for group in groups:
            own = [maps[n] for n in group]
            memory = nn.Parameter(self.values([weights[n] for n in group], own, seed).to(weights[group[0]].dtype))
            for n in group:
                layer = self.layer(maps[n], weights[n])
                layer.memory = memory
                put(module, sites[n], layer.dense() if self.store == "dense" else layer)
            if self.store == "shared":
                names = [f"{sites[n].module}.memory" for n in group]
                tie(module, dict.fromkeys(names[1:], names[0]))
        if self.store == "dense":
            fuse_experts(module)
        return sum(weight.numel() for weight in weights), sum(maps[group[0]].size for group in groups)

    def chosen(self, module: nn.Module) -> tuple[list[Site], list[Tensor]]:
        """The matrices that are shared, in the order of the model, with their weights [out, in].

        Raises:
            SiteError: there is none, or one cannot be read from an array.
        """
        picked = walk.choose(None, anatomy_of(module).sites(module), self)
        found = [(site, weight) for site, _ in picked if (weight := weight_of(module, site)) is not None]
        found = [(site, weight) for site, weight in found if weight.ndim == 2 and weight.numel() >= self.least]
        if not found:
            raise LayoutError(f"{self.name()}: where={self.where!r} skip={self.skip!r} least={self.least} chooses no weight.")
        example = HashedLinear(1, 1, size=1, form="pareto", seed=0, offset=0, scale=1.0)
        faults = [f"{self.name()}: {site.name} {why}." for site, _ in found if (why := why_not_stored(module, site, example))]
        faults += [
            f"{self.name()}: {site.name} holds NaN or infinity, which all would share."
            for site, weight in found
            if not weight.is_meta and not_finite(weight)
        ]
        refuse(SiteError, faults)
        return [site for site, _ in found], [weight for _, weight in found]

    def mapped(self, weights: list[Tensor], groups: list[range], seed: int) -> list[Map]:
        """Where each weight is read from; numbers run through the matrices of a group."""
        maps = []
        for group in groups:
            size, offset = int(self.keep * sum(weights[n].numel() for n in group)), 0
            if size < (least := EDGE**2 + 1 if self.kind == "roast" else 1):
                raise PlanError(f"{self.name()}: keep={self.keep:g} gives an array of {size} values, and needs {least}. Keep more.")
            for n in group:
                deviation = 0.0 if weights[n].is_meta else float(weights[n].float().std(correction=0))
                scale = deviation * 3**0.5 / BOUND or 1.0
                maps.append(Map(self.kind, size, seed, offset, (weights[n].shape[0], weights[n].shape[1]), scale))
                offset += weights[n].numel()
        return maps

    def values(self, weights: list[Tensor], maps: list[Map], seed: int) -> Tensor:
        """ψ [size] at first, float32."""
        size, device = maps[0].size, weights[0].device
        if weights[0].is_meta:
            return torch.empty(size, device=device)
        if self.initial == "random":
            return ((2 * torch.rand(size, generator=torch.Generator().manual_seed(seed)) - 1) * BOUND).to(device)
        return projected(weights, maps, size)

    def layer(self, one: Map, weight: Tensor) -> HashedLinear:
        return HashedLinear(
            *one.shape, size=one.size, form=one.form, seed=one.seed, offset=one.offset, scale=one.scale, scaling=self.scaling,
            dtype=weight.dtype, device="meta",
        )  # fmt: skip

    def planned(self, module: Any, donors: int) -> Any:
        self.share(module, 0)
        return module

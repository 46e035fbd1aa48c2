"""Weight pruning: score the weights, remove the lowest, let the rest make up for it, store what is left.

A method fills in a score (`prune.magnitude`, `prune.wanda`) or does removal and compensation together
(`prune.sparsegpt`). How many are removed of which matrix (`allocate`), in which competition, and how zeros are stored is
written here. Allocation by outliers is OWL (Yin et al. 2023, arXiv:2310.05175), by sizes ERK (arXiv:1911.11134) or
evenly (arXiv:2203.02549). Under a pattern n:m OWL gives each block an n of its own.
Differs: those n have the pattern's own as their mean, where the authors round each; their range, two of eight, is `spread: 0.125`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from modelwright.anatomy import Site, anatomy_of
from modelwright.blocks.sparse import SparseLinear
from modelwright.core import walk
from modelwright.core.method import LayerMethod, ModelMethod, Place, SiteMethod, TensorMethod
from modelwright.core.model import Model, put, unwrapped, weight_of
from modelwright.core.settings import Pattern, fraction, number
from modelwright.core.statistics import Statistics
from modelwright.maths import allocation
from modelwright.maths.masks import lowest, part_of


@dataclass(frozen=True, kw_only=True)
class Pruner(SiteMethod):
    """Zeroes a share of each chosen weight."""

    leaves: ClassVar[frozenset[str]] = frozenset({"sparse"})
    sparsity: float = fraction(0.5)  # of the weights that become zero, 0 to 1
    allocate: Literal["uniform", "erk", "even", "owl"] = "uniform"  # who loses more; erk, even: large matrices, owl: few outliers
    pattern: Pattern | None = None  # "2:4" keeps two of every four inputs, and overrides sparsity
    store: Literal["dense", "sparse"] = "dense"  # sparse: a bit per weight and the nonzeros; needs modelwright to load

    def gained(self) -> frozenset[str]:
        return frozenset() if self.sparsity == 0 and self.pattern is None else self.leaves

    def competing(self) -> Literal["tensor", "row"]:
        """What weights are ranked within."""
        return "tensor"

    def removed(self, score: Tensor) -> Tensor:
        """The mask of the weights to remove, by their score [out, in]."""
        pattern = (self.pattern.keep, self.pattern.of) if self.pattern else None
        return lowest(score, self.sparsity, per=self.competing(), pattern=pattern)

    def stored(self, weight: Tensor) -> Tensor | nn.Module:
        """The pruned weight in the form that the settings ask for."""
        return weight if self.store == "dense" else SparseLinear.from_dense(weight)

    def problems(self) -> list[str]:
        if self.allocate == "uniform":
            return super().problems()
        found = super().problems()
        if self.pattern and self.allocate != "owl":
            found.append(f"{self.allocate} divides one sparsity, and the pattern {self.pattern} leaves none. Use allocate: uniform.")
        if not self.pattern and not isinstance(self.sparsity, float):
            found.append(f"{self.allocate} divides one sparsity, and several were given. Give one number, or use allocate: uniform.")
        return found

    def divided(self, places: Sequence[Place], surveyed: Any) -> dict[Place, dict[str, Any]]:
        if self.allocate in ("erk", "even"):
            shapes = [place.shape for place in places]
            kept = (
                allocation.erk(shapes, 1 - self.sparsity)
                if self.allocate == "erk"
                else allocation.even([*map(math.prod, shapes)], 1 - self.sparsity)
            )
            return {place: {"sparsity": round(1 - keep, 12)} for place, keep in zip(places, kept, strict=True)}
        if self.allocate == "owl" and surveyed is not None:
            every = [sum(math.prod(place.shape) for place in places if place.depth == depth) for depth in range(len(surveyed))]
            chosen = [depth for depth, size in enumerate(every) if size]
            found, sizes = [surveyed[depth] for depth in chosen], [every[depth] for depth in chosen]
            own: list[dict[str, Any]]
            if self.pattern:
                keep, of = self.pattern.keep, self.pattern.of
                own = [{"pattern": Pattern(count, of)} for count in allocation.owl_counts(found, sizes, (keep, of), self.reach())]
            else:
                own = [{"sparsity": round(1 - keep, 12)} for keep in allocation.owl(found, sizes, 1 - self.sparsity, self.reach())]
            of_depth = dict(zip(chosen, own, strict=True))
            return {place: of_depth[place.depth] for place in places if place.depth is not None}
        return {}

    def reach(self) -> float:
        """How far allocate: owl goes from the sparsity."""
        raise AssertionError(f"{self.name()} sees no text, so it has no outliers")

    def zeros(self, rows: int, columns: int) -> int:
        """How many weights of a matrix of this size are removed."""
        if self.pattern:
            return rows * columns // self.pattern.of * (self.pattern.of - self.pattern.keep)
        return rows * part_of(self.sparsity, columns) if self.competing() == "row" else part_of(self.sparsity, rows * columns)

    def unfit(self, shape: tuple[int, ...]) -> str:
        columns = math.prod(shape[1:])
        if self.pattern and columns % self.pattern.of:
            return f"has {columns} inputs, which the pattern {self.pattern} does not divide"
        if self.store == "sparse" and len(shape) != 2:
            return f"has the shape {list(shape)}, and the sparse form is for matrices; use store: dense"
        return ""

    def planned(self, weight: Tensor) -> Tensor | nn.Module:
        if self.store == "dense":
            return weight
        rows, columns = weight.shape
        return SparseLinear(out_features=rows, in_features=columns, nonzeros=rows * columns - self.zeros(rows, columns),
                            dtype=weight.dtype, device="meta")  # fmt: skip

    def promise(self) -> dict[str, Any]:
        return {"zeros": self.pattern.sparsity if self.pattern else self.sparsity}


@dataclass(frozen=True, kw_only=True)
class TensorPruner(Pruner, TensorMethod):
    """Scores by the weights alone: `score(weight [out, in])`, low goes first."""

    allocate: Literal["uniform", "erk", "even"] = "uniform"  # all lose the same; erk: thin matrices less; even: all keep as many

    def score(self, weight: Tensor) -> Tensor:
        raise AssertionError("a TensorPruner writes score")

    def tensor(self, weight: Tensor) -> Tensor | nn.Module:
        return self.stored(weight.masked_fill(self.removed(self.score(weight)), 0))


@dataclass(frozen=True, kw_only=True)
class ModelPruner(Pruner, ModelMethod):
    """Scores all chosen weights at once: `scores(model, sites, calibration, notes)`, a score like each weight, low goes first."""

    scope: Literal["tensor", "model"] = "model"  # the weights of each matrix compete, or those of all
    allocate: Literal["uniform", "erk", "even"] = "uniform"  # all lose the same; erk: thin matrices less; even: all keep as many

    def scores(self, model: Model, sites: Sequence[Site], calibration: Sequence[Any], notes: list[str]) -> list[Tensor]:
        raise AssertionError("a ModelPruner writes scores")

    def leagues(self, sites: Sequence[Site]) -> list[tuple[float, list[int]]]:
        """Where all weights compete: which do with each other, by their numbers, and the sparsity of these together."""
        return [(self.sparsity, list(range(len(sites))))]

    def pruned(self, model: Model, calibration: Sequence[Any], notes: list[str]) -> Model:
        """The model without the weights that go; `calibration` is what `scores` is given."""
        module = unwrapped(model.module)
        chosen = [(site, local) for site, local in walk.choose(module, anatomy_of(module).sites(module), self, notes)
                  if weight_of(module, site) is not None]  # fmt: skip
        chosen = walk.settled(module, chosen, walk.divide(module, chosen, self))
        found = self.scores(model, [site for site, _ in chosen], calibration, notes)
        with torch.no_grad():
            for (site, local), gone in zip(chosen, self.gone(chosen, found), strict=True):
                weight = weight_of(module, site)
                assert weight is not None
                pruned = weight.masked_fill(gone.view_as(weight), 0)
                put(module, site, pruned if pruned.ndim != 2 else local.stored(pruned))
        return model

    def gone(self, chosen: Sequence[tuple[Site, Any]], scores: Sequence[Tensor]) -> list[Tensor]:
        """The masks of the weights to remove."""
        if self.scope == "tensor" or self.pattern:
            matrices = [
                score if score.ndim == 3 and site.stack else score.flatten(1)[None] for (site, _), score in zip(chosen, scores, strict=True)
            ]
            return [torch.stack([local.removed(part) for part in each]) for (_, local), each in zip(chosen, matrices, strict=True)]
        gone: dict[int, Tensor] = {}
        for sparsity, numbers in self.leagues([site for site, _ in chosen]):
            own = [scores[number].flatten() for number in numbers]
            parts = lowest(torch.cat(own)[None], sparsity)[0].split([len(score) for score in own])
            gone |= dict(zip(numbers, parts, strict=True))
        return [gone[number] for number in range(len(chosen))]

    def problems(self) -> list[str]:
        alone = self.scope == "tensor" or isinstance(self.sparsity, float) and self.allocate == "uniform"
        return super().problems() + ["sparsity differs by place, but all weights compete. Use scope: tensor."] * (not alone)

    def planned(self, weight: Any, donors: int = 0) -> Any:
        return Pruner.planned(self, weight)


@dataclass(frozen=True, kw_only=True)
class LayerPruner(Pruner, LayerMethod):
    """Scores by weights and inputs: `score(weight [out, in], statistics)`; or writes `prune`, which also compensates."""

    spread: float = fraction(0.08)  # half of how much more allocate: owl keeps of the block with most outliers than of that with fewest
    outlier: float = number(5.0, low=0)  # times the mean of a block's |weight| × input norm, from where allocate: owl counts one

    def surveys(self) -> tuple[str, ...]:
        return ("norm",) if self.allocate == "owl" else ()

    def survey(self, block: Sequence[tuple[Tensor, Statistics]]) -> float:
        return allocation.outliers([weight.float().abs() * statistics.norm for weight, statistics in block], self.outlier)

    def reach(self) -> float:
        return self.spread

    def score(self, weight: Tensor, statistics: Statistics) -> Tensor:
        raise AssertionError("a LayerPruner writes score or prune")

    def prune(self, weight: Tensor, statistics: Statistics) -> Tensor:
        return weight.masked_fill(self.removed(self.score(weight, statistics)), 0)

    def layer(self, weight: Tensor, statistics: Statistics) -> Tensor | nn.Module:
        return self.stored(self.prune(weight, statistics))

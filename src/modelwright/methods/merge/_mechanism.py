"""Merging tensor by tensor: θ0 + scale · norm(Σ wᵢ · agree(sparsify(θᵢ − θ0))).

The formula is `maths.task_vectors.merge`; a method fills its slots. A verb returns its tensor as `Sliced`: a function
of slices, so that tensors of any size are merged in the memory of a few slices.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

import torch

from modelwright.core.errors import SettingError, refuse
from modelwright.core.method import Method, ModelMethod, Places, TensorMethod
from modelwright.core.settings import fraction, number
from modelwright.maths import task_vectors
from modelwright.maths.slices import Entries, Sliced, Values
from modelwright.maths.task_vectors import Sparsify

Rescale = Literal["inverse", "l1", "none"]
SHARES = ("keep_each", "top_each", "spread_each")  # settings for each donor that are fractions


@dataclass(frozen=True, kw_only=True)
class PointWise(TensorMethod):
    """Merges donors into the model, which is their base; norms, biases and embeddings too."""

    every: ClassVar[bool] = True
    alike: ClassVar[bool] = True
    in_parts: ClassVar[bool] = True
    drops: ClassVar[frozenset[str]] = frozenset({"sparse"})

    where: Places = None  # roles to work on, such as "mlp.*" or "attn.{q,v}"; by default every tensor, norms and embeddings too
    unsurveyed: ClassVar[frozenset[str]] = frozenset()  # settings that the survey does not look at
    carries: ClassVar[bool] = False  # what is NaN or infinite in the model or in a donor is so in the result
    on_changes: ClassVar[bool] = False  # adds to the model what it makes of the donors' changes alone, whatever the model is

    def surveyed(self) -> Self:
        """The method with defaults where its survey does not look: two of them that are equal find the same."""
        plain: dict[str, Any] = {field.name: field.default for field in dataclasses.fields(self) if field.name in self.unsurveyed}
        return dataclasses.replace(self, **plain)

    def everywhere(self, *names: str) -> list[str]:
        """The problems with settings that must be one number, because all tensors are surveyed together."""
        return [
            f"{name} differs by role or depth, but all tensors compete, so that it must be one number."
            for name in names
            if not isinstance(getattr(self, name), (int, float))
        ]


@dataclass(frozen=True, kw_only=True)
class Weighted(Method):
    """Merges donors that count by weights."""

    weights: tuple[float, ...] | None = None  # one for each donor; all 1 when not given

    def __post_init__(self) -> None:
        faults = []  # which come first, since sums of what is infinite say nothing
        for name, values in vars(self).items():
            listed = isinstance(values, (list, tuple)) and (name == "weights" or name.endswith("_each"))
            parts, shares = list(values) if listed else [], name in SHARES
            for place, part in enumerate(parts, 1):
                if isinstance(part, (int, float)) and not (math.isfinite(part) and (not shares or 0 <= part <= 1)):
                    kind = "fractions from 0 to 1" if shares else "numbers"
                    faults.append(f"{self.name()}: {name} are {kind}; got {part!r}, for donor {place} of {len(parts)}.")
        refuse(SettingError, faults)
        super().__post_init__()

    def weights_for(self, donors: int) -> list[float]:
        """One weight for each donor.

        Raises:
            SettingError: another number of weights than of donors.
        """
        return self.each(self.weights, "weights", donors) or [1.0] * donors

    def each(self, values: tuple[float, ...] | None, what: str, donors: int) -> list[float]:
        """A setting that has one value for each donor, as a list; empty when not given."""
        if values is not None and len(values) != donors:
            raise SettingError(self.miscounted(values, what, donors))
        return list(values or ())

    def miscounted(self, values: tuple[Any, ...], what: str, donors: int) -> str:
        """The sentence for another number of values than of donors."""
        return f"{self.name()}: {len(values)} {what} for {donors} donors. Give one for each donor."

    def unfit_for(self, donors: int) -> list[str]:
        listed = {name: values for name, values in vars(self).items() if name in ("weights", "texts") or name.endswith("_each")}
        return [self.miscounted(values, what, donors) for what, values in listed.items() if values is not None and len(values) != donors]


@dataclass(frozen=True, kw_only=True)
class Merger(Weighted, PointWise):
    """Merges donors that count by weights, point by point."""


@dataclass(frozen=True, kw_only=True)
class Reader(Weighted, ModelMethod):
    """Merges donors by what text says of them; holds them in memory."""

    alike: ClassVar[bool] = True
    drops: ClassVar[frozenset[str]] = frozenset({"sparse"})

    texts: tuple[str, ...] | None = None  # one for each donor; by default the recipe's data for all

    def problems(self) -> list[str]:
        if self.weights and min(self.weights) <= 0:
            return [f"weights must be above 0, since every donor's text counts; got {list(self.weights)}."]
        return []


@dataclass(frozen=True, kw_only=True)
class Spherical(Merger):
    """Takes a mean of the donors' directions (`maths.spherical`)."""

    carries: ClassVar[bool] = True

    from_base: bool = False  # the mean is of the donors' changes, and is added to the model

    def problems(self) -> list[str]:
        return ["the weights sum to 0, so there is no mean. Change one."] if self.weights and task_vectors.cancel(self.weights) else []

    def shares(self, donors: int) -> list[float]:
        """The weights over their sum."""
        weights = self.weights_for(donors)
        return [weight / sum(weights) for weight in weights]


@dataclass(frozen=True, kw_only=True)
class TaskVectors(Merger):
    """Adds what the donors learned to the model."""

    on_changes: ClassVar[bool] = True
    base_apart: ClassVar[bool] = True

    scale: float = number(1.0)  # of the merged change, λ
    normalize: bool = False  # divide by the sum of the weights that count
    consensus: bool = False  # at each entry, only donors whose change has the elected sign count
    raw_votes: bool = False  # elect signs on the changes without their weights

    def remarks(self) -> list[str]:
        return ["all weights are 0, so the model stays as it is"] if self.weights and not any(self.weights) else []

    def change(self, weight: Entries, donors: list[Entries], sparsify: list[Sparsify]) -> Values:
        """The merged change, with one way to make sparse for each donor, or none."""
        return task_vectors.added(
            weight, donors, self.weights_for(len(donors)), sparsify=sparsify,
            normalize=self.normalize, consensus=self.consensus, raw_votes=self.raw_votes,
        )  # fmt: skip

    def added(self, weight: Entries, donors: list[Entries], sparsify: list[Sparsify]) -> Sliced:
        """The formula: the model plus `scale` times the merged change."""
        if not sparsify and not self.consensus:
            return task_vectors.moved(weight, donors, self.weights_for(len(donors)), self.scale, normalize=self.normalize)
        return task_vectors.onto(weight, self.change(weight, donors, sparsify), self.scale)


@dataclass(frozen=True, kw_only=True)
class SparseTaskVectors(TaskVectors):
    """Adds a part of what the donors learned."""

    searched: ClassVar[tuple[float, float]] = (0.05, 1.0)  # values of `keep_each` that a search tries

    keep: float = fraction(0.2)  # of each donor's changes
    keep_each: tuple[float, ...] | None = None  # one for each donor, in the place of `keep`

    def keeps(self, donors: int) -> list[float]:
        """The fraction to keep of each donor's changes."""
        return self.each(self.keep_each, "keep_each", donors) or [self.keep] * donors


@dataclass(frozen=True, kw_only=True)
class RescaledTaskVectors(SparseTaskVectors):
    """Adds a part of what the donors learned, which may be made larger for what is missing."""

    rescale: Rescale = "none"  # of what stays: none, inverse (1/keep), l1 (to the sum of sizes before)


@dataclass(frozen=True, kw_only=True)
class RandomTaskVectors(RescaledTaskVectors):
    """Adds a random part of what the donors learned, made larger for what is missing."""

    keep: float = fraction(0.5, low=1e-6)  # of each donor's changes
    rescale: Rescale = "inverse"  # of what stays: inverse (1/keep), l1 (to the sum of sizes before), none

    def drop(self, values: Values, shape: tuple[int, ...], keep: float, seed: int, donor: int) -> Values:
        """The values of a donor's change, by its number, some of them 0 by chance."""
        raise AssertionError(f"{self.name()} writes drop")

    def tensor(self, weight: Entries, donors: list[Entries], rng: torch.Generator) -> Sliced:
        keeps = self.keeps(len(donors))
        return self.added(weight, donors, [self._one(keep, rng.initial_seed() + number, number) for number, keep in enumerate(keeps)])

    def _one(self, keep: float, seed: int, donor: int) -> Sparsify:
        return rescaling(lambda values, shape: self.drop(values, shape, keep, seed, donor), keep, self.rescale)


def rescaling(sparsify: Sparsify, keep: float, rescale: Rescale | float) -> Sparsify:
    """Make sparse, and make what stays larger: by 1/keep (inverse), to the sum of sizes before (l1), not at all (none), or by a factor."""

    def sparse(values: Values, shape: tuple[int, ...]) -> Values:
        if keep >= 1:
            return values
        if keep <= 0:
            return lambda at: torch.zeros_like(values(at))
        kept = sparsify(values, shape)
        if rescale == "none":
            return kept
        if rescale == "l1":
            count = torch.Size(shape).numel()
            kept = task_vectors.remembered(values, kept, count)
            factor = task_vectors.restoring(values, kept, count)
        else:
            factor = 1 / keep if rescale == "inverse" else rescale
        return lambda at: kept(at).mul(factor)

    return sparse


def counted(function: Callable[..., Values], **settings: float) -> Sparsify:
    """A function of values, their number and settings as a way to make sparse."""
    return lambda values, shape: functools.partial(function, **settings)(values, torch.Size(shape).numel())

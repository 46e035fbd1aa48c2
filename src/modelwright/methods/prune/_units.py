"""Structured pruning: score the units of a model, choose which stay, take the others out, make up for what they did.

A unit is what leaves together (`anatomy.Units`): a neuron, a key-value head with its query heads, an expert, a channel.
A method fills slots: `look`, at text, or at weights with a random generator (then its verb asks for `rng` in the place of
text, see `prune.prunenet`); `scores` for every unit by what was seen, low goes first; `compensate`, before the units leave.
What stays is a smaller model without masks or zeros. Methods that prune while they train share the choice of units.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from modelwright.anatomy import Site, anatomy_of
from modelwright.anatomy._base import KINDS, Units
from modelwright.anatomy.removal import lower_experts_per_token, remove_units
from modelwright.blocks.experts import fuse_experts
from modelwright.core.errors import SiteError
from modelwright.core.given import Batch
from modelwright.core.method import Method, ModelMethod
from modelwright.core.model import Model, unwrapped
from modelwright.core.settings import count, fraction
from modelwright.maths.allocation import keep_highest, keep_highest_of_all

Kept = list[list[int]]  # for each entry of units, what stays


@dataclass(frozen=True, kw_only=True)
class UnitChoice(Method):
    """Takes whole units out of a model: which may go, how many, and by which scores."""

    drops: ClassVar[frozenset[str]] = frozenset({"sparse"})
    kinds: ClassVar[tuple[str, ...]] = KINDS  # that the method can take out

    units: tuple[str, ...] = ("mlp", "heads")  # kinds that go: mlp, heads, residual, experts, channels or stages
    share: float = fraction(0.2)  # of the units that go, by what they cost; one of each stays
    scope: Literal["block", "model"] = "block"  # each block loses the same share; or units of all blocks compete
    spare_first: int = count(0, low=0, unit="blocks")  # at the start, left as they are
    spare_last: int = count(0, low=0, unit="blocks")  # at the end, left as they are

    def problems(self) -> list[str]:
        wrong = [kind for kind in self.units if kind not in self.kinds]
        if len(set(self.units)) < len(self.units):
            return [f"units names a kind twice: {', '.join(self.units)}. Name each once."]
        return [f"units are some of {', '.join(self.kinds)}; got {', '.join(wrong) or 'none'}."] if wrong or not self.units else []

    def found(self, module: nn.Module, notes: list[str] | None = None) -> list[Units]:
        """The units that may go, kind after kind, without those of spared blocks.

        Raises:
            SiteError: the model has none of these kinds, or all of its blocks are spared.
        """
        anatomy, whole, lacking = anatomy_of(module), [], []
        for kind in self.units:
            try:
                whole += anatomy.units(module, kind)
            except SiteError as error:
                lacking.append(error)
        if not whole:
            raise lacking[0]
        if notes is not None:
            notes += [f"{self.name()} left one kind alone: {error}" for error in lacking]
        depths = 1 + max((units.depth for units in whole if units.depth is not None), default=0)
        found = [units for units in whole if units.depth is None or self.spare_first <= units.depth < depths - self.spare_last]
        if not found:
            spared = f"spare_first={self.spare_first}, spare_last={self.spare_last}"
            raise SiteError(f"{self.name()}: of {depths} blocks all are spared ({spared}). Lower them.")
        return found

    def kept(self, module: nn.Module, found: Sequence[Units], scores: list[Tensor], share: float | None = None) -> Kept:
        """Which units of each entry stay when `share` goes, by default the method's."""
        share = self.share if share is None else share
        if self.scope == "block":
            return [keep_highest(score, share) for score in scores]
        return keep_highest_of_all(scores, [self.cost(module, units) for units in found], share)

    def cost(self, module: nn.Module, units: Units) -> float:
        """What one unit costs: its parameters."""
        shapes = {name: value.shape for name, value in module.named_parameters()}
        return sum(span.width * shapes[span.name].numel() / shapes[span.name][span.dim] for span in units.spans)

    def planned(self, module: Any, donors: int) -> Any:
        fuse_experts(module)
        found = self.found(module)
        about = [torch.arange(units.count) / units.count + 0.05 * number / len(found) for number, units in enumerate(found)]
        take_out(module, found, self.kept(module, found, about))  # where all compete, not quite the same count of each
        return module

    def taken_out(self, module: nn.Module, found: Sequence[Units], kept: Kept, notes: list[str], why: str = "") -> None:
        """Remove the units that do not stay, and note what the user should know of the result; why: it was not plain before."""
        for kind in self.units if self.share and self.scope == "block" else ():
            counts = [units.count for units in found if units.kind == kind]
            if counts and all(len(rows) == units.count for units, rows in zip(found, kept, strict=True) if units.kind == kind):
                notes.append(f"{self.name()}: no {kind} leave, for {self.share:g} of {max(counts)} is less than one. Raise share")
        config: Any = getattr(module, "config", None)
        before = getattr(config, "num_experts_per_tok", 0)
        if why := take_out(module, found, kept) or why:
            notes.append(loads_otherwise(self.name(), why))
        if before and (now := config.num_experts_per_tok) < before:
            notes.append(f"{self.name()}: tokens go to {now} experts, no longer to {before}, since no more are left")


@dataclass(frozen=True, kw_only=True)
class UnitPruner(UnitChoice, ModelMethod):
    """Takes units out at once."""

    # Slots

    def look(self, model: Model, found: Sequence[Units], source: Any) -> Any:
        """What the other slots must see of the whole model; source: the calibration batches, or else the random generator."""

    def scores(self, module: nn.Module, found: Sequence[Units], seen: Any) -> list[Tensor]:
        """For each entry the score of its units [count], low goes first."""
        raise AssertionError(f"{self.name()} writes scores")

    def compensate(self, module: nn.Module, found: Sequence[Units], kept: Kept, seen: Any) -> str:
        """Make up for what leaves, before it does; why plain transformers could then not load the model, "" when it can."""
        return ""

    # Mechanism, called by the verb with what `look` needs

    def pruned(self, model: Model, source: Any, notes: list[str]) -> Model:
        """The model without the units that go; `source` is what `look` is given."""
        module = unwrapped(model.module)
        found = self.found(module, notes)
        seen = self.look(model, found, source)
        with torch.no_grad():
            scores = self.scores(module, found, seen)
            refuse_not_finite(found, scores)
            kept = self.kept(module, found, scores)
            why = self.compensate(module, found, kept, seen)
        self.taken_out(module, found, kept, notes, why)
        return model


@dataclass(frozen=True, kw_only=True)
class TextUnitPruner(UnitPruner):
    """Takes units out by what it sees of them on text."""

    def model(self, model: Model, calibration: Sequence[Batch], notes: list[str]) -> Model:
        return self.pruned(model, calibration, notes)


def loads_otherwise(name: str, why: str) -> str:
    """What the user should know of a result that no config can say; `name` is the method's."""
    return f"{name}: {why}; so the model loads after `import modelwright`, and not in plain transformers"


def per_member(units: Units, tensors: Mapping[str, Tensor]) -> list[Tensor]:
    """Of tensors that are like the parameters, by their names, the units' channels [count, width, rest], one for each span."""
    parts = [(span, tensors[span.name].narrow(span.dim, span.start, units.count * span.width)) for span in units.spans]
    return [part.movedim(span.dim, 0).reshape(units.count, span.width, -1).float() for span, part in parts]


def last_matrix(module: nn.Module, units: Units) -> Site:
    """The matrix through which units write: the output side of an attention or MLP."""
    names = {span.name for span in units.spans if span.output}
    return next(site for site in anatomy_of(module).sites(module) if site.name in names)


def inputs_of_units(units: Units, values: Tensor) -> Tensor:
    """Of values for each input of the last matrix [in], each unit's [count, width]."""
    span = next(span for span in units.spans if span.output)
    return values.narrow(0, span.start, units.count * span.width).view(units.count, -1)


def take_out(module: nn.Module, found: Sequence[Units], kept: Kept) -> str:
    """Remove the units that do not stay; why plain transformers could not load the result, "" where it can."""
    why, stays = "", {(units.kind, units.scope): rows for units, rows in zip(found, kept, strict=True)}
    for kind in dict.fromkeys(units.kind for units in found):
        every = anatomy_of(module).units(module, kind)
        rows = [stays.get((kind, units.scope), list(range(units.count))) for units in every]
        if kind == "experts":
            lower_experts_per_token(module, min(map(len, rows)))
        why = remove_units(module, kind, rows, plain=False).why_not_plain or why
    return why


def refuse_not_finite(found: Sequence[Units], scores: Sequence[Tensor]) -> None:
    """Raise SiteError where scores are NaN or infinite."""
    bad = [units for units, score in zip(found, scores, strict=True) if not score.isfinite().all()]
    if bad:
        raise SiteError(
            f"The {bad[0].kind} of {bad[0].scope or 'the model'} and {len(bad) - 1} more have scores that are NaN or infinite: "
            "their inputs or gradients are. Look for NaN in the model, or use other calibration text."
        )

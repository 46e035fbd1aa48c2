"""Units that go while all weights of a model train: zeros from then on, and cut out when the run ends.

What stays learns as if they had left: zeros in all weights of a unit give it no gradient, and what the optimizer keeps of the
other weights is theirs alone. A method says at which steps units go and how many, and by which scores.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from modelwright.core.method import TrainMethod
from modelwright.core.settings import fraction
from modelwright.core.training import Course, Zeros, next_token
from modelwright.maths.effects import effects
from modelwright.methods.prune._units import Kept, UnitChoice, per_member


@dataclass(frozen=True, kw_only=True)
class Shrinker(UnitChoice, TrainMethod):
    """Takes units out while all weights train on the next token."""

    share: float = fraction(0.3)  # of the units that go, by what they cost; one of each stays
    effect: Literal["first", "mix"] = "first"  # of the estimate of a weight's effect

    def loss(self, module: nn.Module, ids: Tensor, mask: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return next_token(module, ids, mask)


class Standing(Course):
    """Units with a score each, of which some stand and others went, for good."""

    def __init__(self, method: UnitChoice, module: nn.Module, notes: list[str]):
        self.chooser, self.module, self.notes = method, module, notes
        self.found, device = method.found(module, notes), next(module.parameters()).device
        self.scores = [torch.zeros(units.count, device=device) for units in self.found]
        self.stays = [torch.ones(units.count, dtype=torch.bool, device=device) for units in self.found]
        self.handles: list[Any] = []

    def left(self) -> list[Tensor]:
        """The scores, below all others for units that went."""
        return [score.masked_fill(~stays, -1) for score, stays in zip(self.scores, self.stays, strict=True)]

    def go(self, kept: Kept) -> list[int]:
        """Let the other units go; the entries that lose some."""
        before = [int(stays.sum()) for stays in self.stays]
        for stays, rows in zip(self.stays, kept, strict=True):
            stays.fill_(False)[rows] = True
        return [number for number, rows in enumerate(kept) if len(rows) < before[number]]

    def finish(self) -> None:
        self.leave()
        self.chooser.taken_out(self.module, self.found, [stays.nonzero()[:, 0].tolist() for stays in self.stays], self.notes)

    def leave(self) -> None:
        for handle in self.handles:
            handle.remove()

    def state(self) -> dict[str, Tensor]:
        return {f"{name}.{n}": value for name in ("scores", "stays") for n, value in enumerate(getattr(self, name))}


class Going(Standing, Zeros):
    """Units that go in the course of a run in which all weights train."""

    def __init__(self, method: Shrinker, module: nn.Module, notes: list[str]):
        Standing.__init__(self, method, module, notes)
        Zeros.__init__(self, module.parameters())
        self.shrinker = method

    def saliency(self) -> Iterable[Tensor]:
        """Of each entry of units [count], what the step's gradient says that the loss loses with each."""
        for units in self.found:
            parts = per_member(units, {span.name: self.effect(span.name) for span in units.spans})
            yield torch.stack([part.sum((1, 2)) for part in parts]).sum(0)

    def effect(self, name: str) -> Tensor:
        """Of the weights of a parameter, in its shape; 0 where it has no gradient."""
        value = self.module.get_parameter(name)
        return torch.zeros_like(value) if value.grad is None else effects(self.shrinker.effect, value, value.grad, value.grad.square())

    @torch.no_grad()
    def update(self, step: int) -> None:
        super().update(step)
        self.silence()  # what the optimizer's momentum did

    @torch.no_grad()
    def silence(self) -> None:
        """Let all weights of units that went be 0."""
        for units, stays in zip(self.found, self.stays, strict=True):
            for span in units.spans:
                part = self.module.get_parameter(span.name).narrow(span.dim, span.start, units.count * span.width)
                part.movedim(span.dim, 0)[~stays.repeat_interleave(span.width)] = 0

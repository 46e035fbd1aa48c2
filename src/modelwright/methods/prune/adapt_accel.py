"""Train on, and between shares of the text remove heads and neurons, fewer from blocks that turn their input most: Adapt-Accel.

Pan et al. 2025, arXiv:2502.03460: Adapt-Pruner with training in between. The run is cut into `rounds` of equal length. Each begins
with a step of `prune.adapt_pruner`, by the gradient and the activations of one batch: a block's sparsity grows by share / rounds
- `amplitude`·I, and its heads and neurons of least effect go until floor((1 - sparsity)·n) of the n at first are left, or share ·
round / rounds of all went; in the last round sparsities grow until they did. Then the rest of the round trains what stays. One
schedule of the learning rate runs through all rounds: linear warmup, level, and a fall at the end (`decay`).
Differs: the batch that says what goes is one that trains, and the effect is that of its mean gradient. Units that went are zeros
until the run ends, when they are cut out: what stays and its moments in the optimizer are as if they had left, but no step becomes
faster on the way. The authors do not tell the length of the fall; it is half a cosine here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from modelwright.anatomy import anatomy_of
from modelwright.core.errors import LayoutError, PlanError
from modelwright.core.passage import Similarities
from modelwright.core.settings import count, fraction, number
from modelwright.core.training import Training
from modelwright.maths.allocation import keep_highest_of_all
from modelwright.methods.prune._going import Going, Shrinker
from modelwright.methods.prune.adapt_pruner import due, grown


@dataclass(frozen=True, kw_only=True)
class AdaptAccel(Shrinker):
    """Lose heads and neurons round by round and train in between, in one run; heals each cut, for texts of some length."""

    status: ClassVar[str] = "checked"
    kinds: ClassVar[tuple[str, ...]] = ("mlp", "heads")
    small = dict(tokens=256, batch=2, length=16, rounds=4)

    scope: Literal["model"] = "model"  # blocks lose by what they do
    rounds: int = count(20)  # in each of which some units go, and the rest of it trains
    amplitude: float = number(0.02, low=0)  # how much a block's importance changes its sparsity in a round
    learning_rate: float = number(2e-5, low=0)  # the highest
    decay: float = fraction(0.1)  # of the steps, the last, in which the learning rate falls

    def updates(self, steps: int) -> dict[int, float]:
        """The share that is gone after each step (from 0) at whose end units go."""
        return {number * steps // self.rounds: self.share * (number + 1) / self.rounds for number in range(self.rounds)}

    def course(self, module: nn.Module, settings: Training, notes: list[str]) -> Rounds:
        if settings.steps < self.rounds:
            raise PlanError(f"{self.name()}: {self.rounds} rounds in {settings.steps} steps. Take fewer rounds, or more tokens.")
        return Rounds(self, module, settings, notes)


class Rounds(Going):
    """Units that go at the beginning of each round."""

    def __init__(self, method: AdaptAccel, module: nn.Module, settings: Training, notes: list[str]):
        super().__init__(method, module, notes)
        self.method, self.times = method, method.updates(settings.steps)
        if (path := anatomy_of(module).blocks(module)) is None:
            raise LayoutError(f"{method.name()} compares blocks by what they do; this model has no single row of them.")
        self.blocks: Any = module.get_submodule(path)
        self.depths = list(dict.fromkeys(units.depth for units in self.found))
        self.sparsities = torch.zeros(len(self.depths), dtype=torch.float64)
        self.costs = [method.cost(module, units) for units in self.found]
        self.similarities: Similarities | None = None

    def begin(self, step: int) -> None:
        if step in self.times:
            self.similarities = Similarities(self.blocks)

    @torch.no_grad()
    def gradient(self, step: int) -> None:
        super().gradient(step)
        if self.similarities is not None:
            self.similarities.remove()
            for score, now in zip(self.scores, self.saliency(), strict=True):
                score.copy_(now)

    def update(self, step: int) -> None:
        super().update(step)
        if self.similarities is not None:
            self.go(self.kept(self.times[step], self.similarities.means()))
            self.similarities = None
            self.silence()

    def kept(self, share: float, similarities: list[float]) -> list[list[int]]:
        """Which units of each entry stay, so that `share` of all is gone; a block loses no more than its sparsity, which grows.

        It grows once, and in the last round as often again as there are rounds, until no unit more can go.
        """
        method, kept = self.method, list[list[int]]()
        last = max(self.times.values())
        for _ in range(1 if share < last else 1 + method.rounds):
            before: dict[int | None, float] = dict(zip(self.depths, self.sparsities.tolist(), strict=True))
            gone = grown(before, similarities, method.share / method.rounds, method.amplitude)
            self.sparsities.copy_(torch.tensor(list(gone.values())))
            scores = [due(score, int(units.count * (1 - gone[units.depth]))).masked_fill(~stays, -1)
                      for score, units, stays in zip(self.left(), self.found, self.stays, strict=True)]  # fmt: skip
            kept = keep_highest_of_all(scores, self.costs, share)
            over = [len(rows) - (1 - share) * units.count for rows, units in zip(kept, self.found, strict=True)]
            if sum(cost * units for cost, units in zip(self.costs, over, strict=True)) < min(self.costs):
                break
        return kept

    def leave(self) -> None:
        super().leave()
        if self.similarities is not None:
            self.similarities.remove()

    def state(self) -> dict[str, Tensor]:
        return super().state() | {"sparsities": self.sparsities}

"""Train low-rank updates, and take out the heads and neurons that their gradients say matter least: LoRAPrune.

Zhang et al. 2023, arXiv:2305.18403. Beside every frozen W trains s B A. Before each step of the optimizer a weight's importance is
|G (W + s B A)| with G = dB A + B dA - dB dA, which stands for the gradient of W. Summed over each unit's part of a matrix, divided
by the L2 norm of these sums over all units, and added over the unit's matrices, it joins a moving average (0.9 old, 0.1 new). Every
`every` steps the units with the lowest average of each block go, as many as a cubic ramp says; what went stays gone. At the
end the updates go into the weights, and the units leave.
Differs: query heads count with the key-value head that they leave with. Units are silenced where they are written to the
stream, not where they are read. A step whose gradient is not finite ends the run. The size is taken, as in the authors' code,
where the paper has the square. The base trains in float32 and not in 8 bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from modelwright.anatomy import anatomy_of
from modelwright.anatomy._base import Units
from modelwright.core.beside import Beside
from modelwright.core.method import TrainMethod
from modelwright.core.settings import count, fraction, number
from modelwright.core.training import Training, next_token
from modelwright.maths.low_rank import gradient_of_product
from modelwright.maths.schedules import along, cubic, times_within
from modelwright.methods.prune._going import Standing
from modelwright.methods.prune._units import UnitChoice, last_matrix, per_member

OLD = 0.9  # what an average keeps of itself at each step


@dataclass(frozen=True, kw_only=True)
class LoraPrune(UnitChoice, TrainMethod):
    """Tune to the text with low-rank updates while heads and neurons go; cheap in memory, and adapted when it is done."""

    status: ClassVar[str] = "checked"
    kinds: ClassVar[tuple[str, ...]] = ("mlp", "heads")
    small = dict(tokens=256, batch=2, length=16, every=2, spare_first=1, spare_last=1)

    share: float = fraction(0.5)  # of the units that go, by what they cost; one of each stays
    scope: Literal["block"] = "block"  # each block loses the same share
    spare_first: int = count(3, low=0, unit="blocks")  # at the start, left as they are
    spare_last: int = count(1, low=0, unit="blocks")  # at the end, left as they are
    initial: float = fraction(0.0)  # of the units that go at `begin`
    begin: float = fraction(0.1)  # of the run, where pruning begins
    end: float = fraction(0.9)  # of the run, where it ends; the rest lets the model settle
    every: int = count(10, unit="steps")  # between two times that units go
    rank: int = count(8)  # rows of A, columns of B
    alpha: float = number(16.0, low=0)  # the update is scaled by alpha / rank
    dropout: float = fraction(0.05, high=0.99)  # of the update's inputs, while training
    learning_rate: float = number(1e-4, low=0)  # the highest
    weight_decay: float = number(0.0, low=0)  # of matrices only

    def problems(self) -> list[str]:
        return (
            super().problems()
            + ["begin is after end. Let it be before."] * (self.begin > self.end)
            + ["initial is above share, and units that went do not come back."] * (self.initial > self.share)
        )

    def loss(self, module: nn.Module, ids: Tensor, mask: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return next_token(module, ids, mask)

    def updates(self, steps: int) -> dict[int, float]:
        """The share gone after each step (from 0) that ends with a choice of units."""
        times = times_within([step / steps for step in range(steps)], self.begin, self.end, self.every)
        ramp = {step: cubic(along(step / steps, self.begin, self.end), self.initial, self.share) for step in times}
        return {**ramp, times[-1]: self.share}

    def course(self, module: nn.Module, settings: Training, notes: list[str]) -> Leaving:
        return Leaving(self, module, settings, notes)


class Leaving(Standing):
    """Units that leave while updates train beside the matrices."""

    def __init__(self, method: LoraPrune, module: nn.Module, settings: Training, notes: list[str]):
        super().__init__(method, module, notes)
        self.method, self.times = method, method.updates(settings.steps)
        sites = [site for site in anatomy_of(module).sites(module) if site.role.startswith(("attn.", "mlp."))]
        self.beside = Beside(module, sites, rank=method.rank, alpha=method.alpha, dropout=method.dropout, seed=settings.seed)
        layers = [module.get_submodule(last_matrix(module, units).module) for units in self.found]
        self.handles = [layer.register_forward_pre_hook(self.silencer(number)) for number, layer in enumerate(layers)]

    def silencer(self, number: int) -> Any:
        def silence(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return args[0] * self.stays[number].repeat_interleave(args[0].shape[-1] // self.found[number].count), *args[1:]

        return silence

    @torch.no_grad()
    def gradient(self, step: int) -> None:
        effects = {}
        for site, layer in self.beside.layers.items():
            update, stored = self.beside.updates[site.name], layer.get_parameter("weight")
            weight = stored.T if site.transposed else stored
            assert update.up.grad is not None and update.down.grad is not None
            estimate = gradient_of_product(update.up, update.down, update.up.grad, update.down.grad)
            effect = (estimate * (weight + update.change())).abs()
            effects[site.name] = effect.T if site.transposed else effect
        for score, units in zip(self.scores, self.found, strict=True):
            score.mul_(OLD).add_(importance(units, effects), alpha=1 - OLD)

    def update(self, step: int) -> None:
        if step in self.times:
            self.go(self.method.kept(self.module, self.found, self.left(), self.times[step]))

    def finish(self) -> None:
        self.beside.fold()
        super().finish()

    def leave(self) -> None:
        self.beside.remove()
        super().leave()


def importance(units: Units, effects: dict[str, Tensor]) -> Tensor:
    """The score of each unit [count] from its parts of matrices, by their names, each divided by its norm over the units."""
    spans = tuple(span for span in units.spans if span.name in effects)
    parts: Sequence[Tensor] = [part.sum((1, 2)) for part in per_member(replace(units, spans=spans), effects)]
    return torch.stack([part / part.norm().clamp(min=1e-30) for part in parts]).sum(0)

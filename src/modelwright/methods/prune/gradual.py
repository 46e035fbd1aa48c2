"""Zero the smallest weights little by little while the model trains: the gradual cubic schedule.

Zhu, Gupta 2017, To prune, or not to prune, arXiv:1710.01878, section 3: s = s_f + (s_i - s_f) · (1 - t)³, with t from 0 at
`begin` to 1 at `end`, and masks by size in each matrix. Counted in compute (`clock: compute`), from a quarter of it to three
quarters, it is the schedule of sparse pre-training (Jin et al. 2025, arXiv:2501.12486), whose ramp may be another; the mean
number of parameters over all steps, which their scaling law takes, is in the notes.
Differs: by default a weight that went does not come back; with `returning` it keeps its value, as theirs, and comes back once those
that stay have become smaller. The compute of a step is taken as proportional to the weights that are not 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from modelwright.anatomy import anatomy_of
from modelwright.core import walk
from modelwright.core.method import Places, TrainMethod
from modelwright.core.model import tensor_of, weight_of
from modelwright.core.settings import count, fraction
from modelwright.core.training import Training, Zeros, next_token
from modelwright.maths.masks import lowest
from modelwright.maths.schedules import along, compute_at_steps, cubic, times_within


@dataclass(frozen=True, kw_only=True)
class Gradual(TrainMethod):
    """Train on the next token while `sparsity` rises; what it costs is a training run, what it keeps is more than one shot."""

    status: ClassVar[str] = "checked"
    leaves: ClassVar[frozenset[str]] = frozenset({"sparse"})
    sites: ClassVar[tuple[str, ...]] = ("attn", "mlp", "experts", "linear")
    small = dict(tokens=256, batch=2, length=16, every=2)

    sparsity: float = fraction(0.5)  # of the weights that are zero from `end` on
    initial: float = fraction(0.0)  # of the weights that become zero at `begin`
    begin: float = fraction(0.0)  # of the run, where pruning begins
    end: float = fraction(0.75)  # of the run, where it ends; from then on the zeros are fixed
    every: int = count(100, unit="steps")  # between two times that weights go
    returning: bool = False  # weights that went keep their values, and come back where those that stay become smaller
    clock: Literal["steps", "compute"] = "steps"  # what begin and end are shares of; sparse steps count for less compute
    where: Places = None  # roles to work on; by default the matrices of the blocks
    skip: Places = None  # roles to leave alone

    def problems(self) -> list[str]:
        return ["begin is after end. Let it be before."] * (self.begin > self.end) + [
            "initial is above sparsity, and weights that went do not come back."
        ] * (self.initial > self.sparsity)

    def loss(self, module: nn.Module, ids: Tensor, mask: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return next_token(module, ids, mask)

    def updates(self, steps: int, share: float = 1.0) -> dict[int, float]:
        """The sparsity of each step (from 0) before which weights go; `share`: of all parameters, those that may go."""

        def at(spent: float) -> float:
            return 0.0 if spent < self.begin else cubic(along(spent, self.begin, self.end), self.initial, self.sparsity)

        counted = self.clock == "compute"
        spent = compute_at_steps(steps, lambda point: max(1 - share * at(point), 1e-9) if counted else 1.0)
        times = times_within(spent, self.begin, self.end, self.every)
        return {**{step: at(spent[step]) for step in times}, times[-1]: self.sparsity}

    def course(self, module: nn.Module, settings: Training, notes: list[str]) -> Zeros:
        chosen = walk.choose(module, anatomy_of(module).sites(module), self, notes)
        found = [(site, tensor_of(module, site.name)) for site, _ in chosen if weight_of(module, site) is not None]
        parameters = dict(module.named_parameters())
        weights = [(parameters[site.name], site.stack or 1) for site, _ in found if parameters[site.name].requires_grad]
        total = sum(value.numel() for value in parameters.values())
        share = sum(weight.numel() for weight, _ in weights) / total
        updates = self.updates(settings.steps, share)
        mean = mean_kept(updates, settings.steps, share) * total
        notes.append(f"{self.name()}: the mean over steps of the parameters that are not zero is {mean:,.0f} of {total:,}")
        return Rising(list(parameters.values()), weights, updates, returning=self.returning)


class Rising(Zeros):
    """Zeros that become more at some steps, or, when weights may return, others."""

    def __init__(
        self, every: Sequence[Tensor], weights: Sequence[tuple[Tensor, int]], updates: dict[int, float], *, returning: bool = False
    ):
        self.weights, self.updates = weights, updates
        self.gone = [torch.zeros_like(weight) for weight, _ in weights] if returning else []  # their values; 0 for those that stay
        super().__init__(every)

    def find(self) -> None:
        super().find()
        self._kept += [(weight, weight.detach() != 0) for weight, _ in self.weights if not weight.detach().any()]

    def begin(self, step: int) -> None:
        if step in self.updates:
            for number, (weight, matrices) in enumerate(self.weights):
                values = weight.data + self.gone[number] if self.gone else weight.data
                gone = lowest(values.abs().reshape(matrices, -1), self.updates[step], per="row").view_as(values)
                if self.gone:
                    self.gone[number] = values.masked_fill(~gone, 0)
                weight.data.copy_(values.masked_fill(gone, 0))
            self.find()

    def state(self) -> dict[str, Tensor]:
        return {f"gone.{number}": values for number, values in enumerate(self.gone)}

    def resume(self, state: dict[str, Tensor]) -> None:
        self.gone = [state[f"gone.{number}"].to(values) for number, values in enumerate(self.gone)]


def mean_kept(updates: dict[int, float], steps: int, share: float) -> float:
    """The mean over steps of the share of parameters that are not zero, when `share` of them may become so."""
    sparsity, total = 0.0, 0.0
    for step in range(steps):
        sparsity = updates.get(step, sparsity)
        total += 1 - share * sparsity
    return total / steps

"""Find on text how much each donor needs of the merged change, and add what several need: TALL masks with their search.

Wang et al. 2024, arXiv:2405.07813, sections 4.1 and 5: λᵢ of the mask mᵢ = |τᵢ| > λᵢ·|τ_M - τᵢ| is that of {0.2, 0.3, 0.4, 0.5, 0.6}
with which θ0 + τ_M ⊙ mᵢ does best on task i; then the masks are put to the vote, as in `merge.consensus`, whose settings are told.
Differs: does best means the least loss of the next token on the donor's text (`texts`), or on the recipe's text for all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from modelwright.core import kinds
from modelwright.core.given import Batch
from modelwright.core.model import Model, unwrapped
from modelwright.core.settings import count, number
from modelwright.core.together import same_tensors
from modelwright.maths.slices import Values
from modelwright.maths.task_vectors import onto
from modelwright.methods.merge._mechanism import Reader
from modelwright.methods.merge._objective import nats, search
from modelwright.methods.merge.consensus import Consensus


@dataclass(frozen=True, kw_only=True)
class TallMasks(Reader):
    """Add the changes that at least `agree` donors need, by masks that serve each of them best on its text."""

    status: ClassVar[str] = "checked"
    base_apart: ClassVar[bool] = True
    causal: ClassVar[bool] = True
    neutral = dict(scale=0.0)

    agree: int = count(2, low=0)  # donors that must need an entry, k
    scale: float = number(1.0)  # of the merged change, λ
    lowest: float = number(0.2, low=0)  # bound of a mask that is tried
    highest: float = number(0.6, low=0)  # bound of a mask that is tried
    points: int = count(5, low=2)  # bounds from the one to the other that are tried for each donor

    def problems(self) -> list[str]:
        found = [] if self.lowest < self.highest else [f"lowest {self.lowest} is not less than highest {self.highest}."]
        return super().problems() + found

    @torch.no_grad()
    def model(self, model: Model, donors: Sequence[Model], calibration: Sequence[Sequence[Batch]], notes: list[str]) -> Model:
        self.consensus([self.lowest] * len(donors)).refuse_too_few(len(donors))
        same_tensors(model, donors)
        module = unwrapped(model.module)
        own = {name: value for name, value in kinds.held(module).items() if value.is_floating_point()}
        base = {name: value.clone() for name, value in own.items()}
        held = [kinds.held(unwrapped(donor.module)) for donor in donors]
        ends: Mapping[str, list[Any]] = {name: [one[name] for one in held] for name in own}

        def alone(donor: int, least: float) -> None:
            """θ0 + τ_M ⊙ m of one donor, into the model."""
            method = self.consensus([least] * len(donors))
            for name, value in own.items():
                value.copy_(onto(base[name], masked(*method.mask(base[name], ends[name], donor)), 1.0).whole())

        chosen, tried = [], {"least": (self.lowest, self.highest)}
        for donor, batches in enumerate(calibration):

            def objective(trial: Any, donor: int = donor, batches: Sequence[Batch] = batches) -> float:
                alone(donor, trial.suggest_float("least", *tried["least"]))
                return nats(module, batches)

            study = search(objective, tried, {}, "grid", self.points, self.points, 0, self.name())
            chosen.append(study.best_params["least"])
            losses = ", ".join(
                f"{trial.params['least']:g}: {trial.value:.4f}" for trial in sorted(study.trials, key=lambda one: one.params["least"])
            )
            notes.append(f"{self.name()}: nats of {donors[donor].name} by its bound: {losses}")
        method = self.consensus(chosen)
        for name, value in own.items():
            value.copy_(method.tensor(base[name], ends[name]).whole())
        notes.append(f"the merge: {{{method.name()}: {method.settings()}}}")
        return model

    def consensus(self, least: Sequence[float]) -> Consensus:
        """The merge with these bounds."""
        return Consensus(weights=self.weights, agree=self.agree, scale=self.scale, least_each=tuple(least))


def masked(change: Values, mask: Values) -> Values:
    """The change where the mask is true, and 0 elsewhere."""

    def values(at: slice) -> Tensor:
        return change(at).mul_(mask(at))

    return values

"""Remove the heads and neurons whose weights the loss feels least, by its gradient: LLM-Pruner.

Ma, Fang, Wang 2023, arXiv:2305.11627, sections 3.1 and 3.2. Of a weight w with gradient g and Fisher information F, the mean of g² over
examples: |w g| (`first`), |w F w| (`second`), |w g - w F w / 2| (`mix`), or |Σ w g| over the channel that a weight stands in
(`channel`, their vectorize). What it sums to in each matrix of a unit is reduced by `members`.
Differs: query heads are scored with the key-value head that they leave with; the authors' code pairs others where several share one.
Models with fewer blocks than are spared need `spare_first` and `spare_last`. Recovery is a step of its own, such as `distill.recover`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from modelwright.anatomy._base import Units
from modelwright.core.given import Batch
from modelwright.core.gradients import gradient_moments
from modelwright.core.model import Model
from modelwright.core.settings import count, fraction
from modelwright.maths.effects import Effect, effects
from modelwright.methods.prune._units import TextUnitPruner, per_member


@dataclass(frozen=True, kw_only=True)
class LlmPruner(TextUnitPruner):
    """Take out the heads and neurons with the least first- or second-order effect on the loss; then train a little."""

    status: ClassVar[str] = "checked"
    causal: ClassVar[bool] = True
    neutral = dict(share=0.0)
    small = dict(spare_first=1, spare_last=1)

    share: float = fraction(0.25)  # of the units that go, by what they cost; one of each stays
    spare_first: int = count(4, low=0, unit="blocks")  # at the start, left as they are
    spare_last: int = count(2, low=0, unit="blocks")  # at the end, left as they are
    effect: Effect = "first"  # of the estimate of a weight's effect
    members: Literal["sum", "mean", "max", "prod"] = "sum"  # how the matrices of a unit are reduced to one score

    def look(self, model: Model, found: Sequence[Units], calibration: Sequence[Batch]) -> dict[str, Tensor]:
        """The effect of each weight, signed for `channel`."""
        mean, square = gradient_moments(model, calibration)
        parameters = {name: value.detach().float() for name, value in model.module.named_parameters() if name in mean}
        return {name: effects(self.effect, value, mean[name], square[name]) for name, value in parameters.items()}

    def scores(self, module: nn.Module, found: Sequence[Units], seen: Any) -> list[Tensor]:
        return [self.reduced(per_member(units, seen)) for units in found]

    def reduced(self, parts: list[Tensor]) -> Tensor:
        """Effects [count, width, rest] of the matrices of units to one score for each unit."""
        scores = torch.stack([part.sum(2).abs().sum(1) for part in parts])
        reduced = {"sum": scores.sum(0), "mean": scores.mean(0), "max": scores.amax(0), "prod": scores.prod(0)}
        return reduced[self.members]

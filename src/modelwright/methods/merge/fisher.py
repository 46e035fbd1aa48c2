"""Average models, each weight by how much its donor's predictions depend on it.

Matena, Raffel 2021, arXiv:2111.09832, section 3.2: θ = Σ w_i F_i θ_i / Σ w_i F_i, with F_i the diagonal of the Fisher
information of donor i on its own text.
Differs: a row of the text is one example, which predicts the token after its last one, as in MergeBench; the paper's
mean over all classes is `targets: exact`. Where no donor has information, the plain weighted mean stands.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from modelwright.core.given import Batch
from modelwright.core.gradients import Targets, floats, squared_gradients
from modelwright.core.model import Model, unwrapped
from modelwright.core.settings import number
from modelwright.core.together import same_tensors
from modelwright.maths.task_vectors import average
from modelwright.methods.merge._mechanism import Reader


@dataclass(frozen=True, kw_only=True)
class Fisher(Reader):
    """Replace every weight by the donors' mean, weighted by the mean square of each example's gradient."""

    status: ClassVar[str] = "checked"

    targets: Targets = "predicted"  # whose log-probability is differentiated: predicted (the most likely), sampled, exact (all), text
    smallest: float = number(1e-10, low=0)  # added to the information of every weight

    def model(self, model: Model, donors: Sequence[Model], calibration: Sequence[Sequence[Batch]], rng: torch.Generator) -> Model:
        same_tensors(model, donors)
        weights = self.weights_for(len(donors))
        above = {name: torch.zeros_like(value, dtype=torch.float32) for name, value in floats(unwrapped(model.module)).items()}
        below = {name: torch.zeros_like(total) for name, total in above.items()}
        for donor, weight, batches in zip(donors, weights, calibration, strict=True):
            information = squared_gradients(donor, batches, self.targets, rng)
            for name, value in floats(unwrapped(donor.module)).items():
                share = information.pop(name).add_(self.smallest).mul_(weight)
                below[name] += share
                above[name] += share.mul_(value.data)
        for name, value in floats(unwrapped(model.module)).items():
            mean = average([unwrapped(donor.module).get_parameter(name).data for donor in donors], weights, dtype=torch.float32).whole()
            value.data.copy_(torch.where(below[name] > 0, above[name] / below[name], mean.to(value.device)))
        return model

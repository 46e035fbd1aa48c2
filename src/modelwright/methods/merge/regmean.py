"""Merge each matrix so that its outputs are nearest to the donors', each on its own text.

Jin, Ren, Preotiuc-Pietro, Cheng 2022, arXiv:2212.09849, algorithm 1: W = (Σ w_i W_i G_i)(Σ w_i G_i)⁻¹ with G_i = E[x xᵀ]
over the inputs of donor i, what is off the diagonal times `shrink`. What is no matrix of a block is averaged. With
`onward: model` activations pass through the merged blocks: RegMean++ (arXiv:2508.03121).
Differs: padding does not count. Where Σ G_i has no inverse, the donors' mean stays for inputs that never came, where the
authors' code makes the weights small or zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from modelwright.core.given import Batch
from modelwright.core.model import Model, put, unwrapped
from modelwright.core.settings import fraction
from modelwright.core.together import inputs_of_layers, same_tensors, set_average
from modelwright.maths.regression import nearest, shrunk
from modelwright.methods.merge._mechanism import Reader


@dataclass(frozen=True, kw_only=True)
class Regmean(Reader):
    """Solve for the matrix that predicts the outputs of all donors best; average the rest."""

    status: ClassVar[str] = "checked"

    shrink: float = fraction(0.5)  # what a moment is multiplied by off its diagonal
    onward: Literal["donor", "model"] = "donor"  # whose blocks carry the activations on: each donor's own, or the merged ones

    @torch.no_grad()
    def model(self, model: Model, donors: Sequence[Model], calibration: Sequence[Sequence[Batch]]) -> Model:
        same_tensors(model, donors)
        weights = self.weights_for(len(donors))
        set_average(model, donors, weights)
        for sites, matrices, statistics in inputs_of_layers(model, donors, calibration, ("moment",), onward=self.onward):
            solve = nearest([shrunk(one.moment, self.shrink) for one in statistics], weights)
            for site, each in zip(sites, matrices, strict=True):
                put(unwrapped(model.module), site, solve(each))
        return model

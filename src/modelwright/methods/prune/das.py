"""Find the attentions and MLPs that small adapters can stand for, by a bandit's search while the adapters learn: DAS.

Wu et al. 2023, Dynamic Architecture Skipping, arXiv:2309.01479. Every candidate i has a score z_i, 0 at first, and
p_i = sigmoid(z_i). In each step of the search `branches` of them, drawn by p without replacement, are replaced by adapters (norm,
down, relu, up), and the others run, with narrower adapters beside them; the adapters learn, and nothing else. Between `begin`
and `end`, after every so many steps, `draws` choices are tried on one batch, and each i of choice j gets
z_i += pull · (r_j - mean r) · p_i (1 - p_i), r = e to the minus loss. Then the choice with the largest z stays, and goes on learning.
Differs: the reward is by the loss of the next token on text that is set aside, one batch in five. An adapter takes the
place of the norm that serves its part alone too. An attention stays where caches read their length.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from modelwright.anatomy import anatomy_of
from modelwright.anatomy._base import Branch
from modelwright.blocks.adapter import Adapter
from modelwright.blocks.beside import Beside
from modelwright.blocks.removed import fitting, replace_branches
from modelwright.core import training
from modelwright.core.errors import PlanError
from modelwright.core.given import Batch
from modelwright.core.gradients import finite_loss, text_loss
from modelwright.core.method import ModelMethod
from modelwright.core.model import Model
from modelwright.core.parts import alone, leaving_on_error, refuse_adapters, row_of
from modelwright.core.settings import count, fraction, number
from modelwright.core.skipping import Search


@dataclass(frozen=True, kw_only=True)
class Das(ModelMethod):
    """Replace whole attentions and MLPs by small adapters that learn on the text; the weights that stay do not change."""

    status: ClassVar[str] = "checked"
    causal: ClassVar[bool] = True
    wants: ClassVar[frozenset[str]] = frozenset()
    drops: ClassVar[frozenset[str]] = frozenset({"float"})
    small = dict(branches=1, mode="mlp", inner=8, beside=4, steps=4, batch=2, every=1, begin=0.0, end=1.0)

    branches: int = count(4, low=0, unit="attentions and MLPs")  # that adapters replace
    mode: Literal["mha", "mlp", "mix"] = "mix"  # which may go: attentions, MLPs, or both
    inner: int = count(192)  # inner width of an adapter in the place of a part
    beside: int = count(96, low=0)  # inner width of an adapter beside each part that stays; 0 for none
    steps: int = count(400)  # in which adapters learn
    batch: int = count(8, unit="sequences")  # in one step
    learning_rate: float = number(5e-4, low=1e-12)  # the highest
    begin: float = fraction(0.1)  # of the steps, where scores begin to move
    end: float = fraction(0.4)  # of the steps, where the search ends
    every: int = count(10, unit="steps")  # between two times that choices are tried
    draws: int = count(3, low=2)  # choices that are tried at once
    pull: float = number(1.0, low=0)  # how far a reward moves a score

    def problems(self) -> list[str]:
        return ["begin is after end. Let it be before."] * (self.begin > self.end) + [
            "branches and beside are 0, so nothing would learn. Give one of them."
        ] * (not self.branches and not self.beside)

    def model(self, model: Model, calibration: Sequence[Batch], rng: torch.Generator, notes: list[str]) -> Model:
        refuse_adapters(self, model)
        aside = max(len(calibration) // 5, 1) if len(calibration) > 1 else 0
        tried = list(calibration[len(calibration) - aside :]) if aside else list(calibration)
        ids, length = row_of(calibration[: len(calibration) - aside], self.name())
        found, before = self.found(model.module), finite_loss(model, calibration, self.name())
        search = Search(self, model, found, self.adapters(model.module, found), tried, rng)
        run = training.Training(
            tokens=self.steps * self.batch * length, batch=self.batch, length=length, learning_rate=self.learning_rate, weight_decay=0.0,
            seed=rng.initial_seed() % 2**31,
        )  # fmt: skip
        beside = [part for part in model.module.modules() if isinstance(part, Beside)]
        with leaving_on_error(beside), search.attached() as parameters, alone(model.module, parameters):
            training.train(model.module, ids, run, search.loss, report=search.step)
        chosen = search.best()
        replace_branches(model.module, {found[place]: search.stands[place] for place in chosen})
        scores = ", ".join(f"{branch} ({score:.4f})" for branch, score in zip(found, search.scores.tolist(), strict=True))
        after = text_loss(model, calibration)
        notes += [
            f"{self.name()}: adapters stand for {', '.join(str(found[place]) for place in chosen) or 'nothing'}; scores {scores}",
            f"{self.name()}: the perplexity of the calibration text, from which adapters learnt, goes from {math.exp(before):.6g} to "
            f"{math.exp(min(after, 700)):.6g}",
        ]
        return model

    def found(self, module: nn.Module) -> list[Branch]:
        """The candidates, in the order of the blocks.

        Raises: PlanError when fewer can be replaced than are to be, or adapters are there already.
        """
        if any(isinstance(part, (Adapter, Beside)) for part in module.modules()):
            raise PlanError(f"{self.name()}: this model has adapters that have learnt already. Start from the model before that.")
        kinds = {"mha": ("attn",), "mlp": ("mlp",), "mix": ("attn", "mlp")}[self.mode]
        found = [branch for branch in anatomy_of(module).branches(module) if branch.kind in kinds]
        if len(fitting(module, found, range(len(found)), len(found))) < self.branches:
            raise PlanError(f"{self.name()}: {self.branches} parts are to go, and of {len(found)} not as many can. Replace fewer.")
        return found

    def adapters(self, module: Any, found: Sequence[Branch]) -> list[Adapter]:
        """One for the place of each candidate; and those beside all parts are put in."""
        like = next(value for value in module.parameters() if value.is_floating_point())
        shape: Any = {"features": module.config.get_text_config().hidden_size, "dtype": like.dtype, "device": like.device}
        if self.beside:
            for branch in anatomy_of(module).branches(module):
                Beside(**shape, inner=self.beside).join(module.get_submodule(branch.module), "beside")
        return [Adapter(**shape, inner=self.inner, gives="pair" if branch.kind == "attn" else "sum") for branch in found]

    def planned(self, module: Any, donors: int) -> Any:
        found = self.found(module)
        stands = self.adapters(module, found)
        last = fitting(module, found, range(len(found) - 1, -1, -1), self.branches)
        replace_branches(module, {found[place]: stands[place] for place in last})
        return module

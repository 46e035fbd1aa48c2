"""A bandit that learns which parts of a model small adapters can stand for, while the adapters learn."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from modelwright.anatomy._base import Branch
from modelwright.blocks.adapter import Adapter
from modelwright.blocks.beside import Beside
from modelwright.blocks.removed import fitting, without

from . import training
from .given import Batch
from .gradients import text_loss
from .model import Model

Choice = tuple[int, ...]  # of candidates, by their places


class Search:
    """The bandit and its adapters, while they learn.

    method: with the settings of `prune.das`. found: the candidates. stands: the adapter for each. tried: batches for rewards.
    """

    def __init__(self, method: Any, model: Model, found: Sequence[Branch], stands: Sequence[Adapter], tried: Sequence[Batch],
                 rng: torch.Generator):  # fmt: skip
        self.method, self.model, self.found, self.stands, self.tried, self.rng = method, model, found, stands, tried, rng
        self.scores = torch.zeros(len(found), dtype=torch.float64)
        self.done = 0
        bodies = [part.body for part in (*stands, *model.module.modules()) if isinstance(part, (Adapter, Beside))]
        for body in bodies:
            body.begin(rng)
        self.parameters = [value for body in bodies for value in body.parameters()]

    @contextlib.contextmanager
    def attached(self) -> Iterator[list[nn.Parameter]]:
        """The adapters that stand for parts belong to the model inside, so that they are trained with it."""
        self.model.module.add_module("stands", nn.ModuleList(self.stands))
        try:
            yield self.parameters
        finally:
            del self.model.module.stands

    @contextlib.contextmanager
    def replaced(self, choice: Choice) -> Iterator[None]:
        """The model with adapters in the places of a choice."""
        with contextlib.ExitStack() as taken:
            for place in choice:
                taken.enter_context(without(self.model.module, self.found[place], self.stands[place]))
            yield

    def loss(self, module: nn.Module, ids: Tensor, mask: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Of the next token, with a choice that is drawn, or with the best after the search."""
        module.eval()
        searching = self.done < self.method.end * self.method.steps
        with self.replaced(self.drawn() if searching else self.best()):
            return training.next_token(module, ids, mask)

    def drawn(self) -> Choice:
        """Candidates by their probabilities, without replacement, that may go together."""
        chances = self.scores.sigmoid().clamp_min(1e-9)
        order = torch.multinomial(chances, len(chances), generator=self.rng).tolist()
        return fitting(self.model.module, self.found, order, self.method.branches)

    def best(self) -> Choice:
        """Those of the largest scores that may go together."""
        return fitting(self.model.module, self.found, self.scores.argsort(descending=True, stable=True).tolist(), self.method.branches)

    def step(self, done: int, total: int, parts: dict[str, float]) -> None:
        """A step is over; at times scores move."""
        self.done = done
        within = self.method.begin * total < done <= self.method.end * total
        if within and done % self.method.every == 0 and self.method.branches:
            choices, left = [self.drawn()], 20 * self.method.draws
            while len(choices) < self.method.draws and (left := left - 1):  # few parts have few choices
                choices = list(dict.fromkeys([*choices, self.drawn()]))
            batch = self.tried[(done // self.method.every) % len(self.tried)]
            self.learn(choices, [self.reward(choice, batch) for choice in choices])

    def reward(self, choice: Choice, batch: Batch) -> float:
        """e to the minus loss of a batch; 0 where the loss is not finite."""
        with self.replaced(choice):
            loss = text_loss(self.model, [batch])
        return math.exp(-loss) if math.isfinite(loss) else 0.0

    def learn(self, choices: Sequence[Choice], rewards: Sequence[float]) -> None:
        """Move the scores of what was chosen by how much better than the mean its choice was."""
        mean, chances = sum(rewards) / len(rewards), self.scores.sigmoid()
        for choice, reward in zip(choices, rewards, strict=True):
            for place in choice:
                self.scores[place] += self.method.pull * (reward - mean) * chances[place] * (1 - chances[place])

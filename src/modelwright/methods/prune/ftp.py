"""Let each block compute only the tokens that a small router chooses, and learn the routers beside the frozen model: FTP.

Li, Chen, Song, Ji, Lu, Wu 2024, FTP, arXiv:2412.11494. A block gives h + z (Block(h) - h), z by a router on four numbers: the token's
place, its score by the attention of the block before, that score's rank, and the share s of tokens that pass. The shares of
the blocks, whose mean is fixed, are searched genetically by the text's loss with a static router, which computes the tokens
that get the most attention, and the first and the last. Then the routers learn: guide · (cross-entropy to the static choice)
+ balance · |mean(1 - z) - s| + logits · (KL to the whole model's predictions); at last a shift of each meets its share on the text.
Keys and values: those of tokens that pass are computed too, so that later tokens attend to all; queries and MLPs are left out.
Differs: written without the authors' code. A score must be known when a token is generated, so it is the attention that the token
gives itself, and its rank among what it attends to. The first block computes all tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from modelwright.blocks.token_router import MOST, TokenRouter, route_tokens
from modelwright.core import training
from modelwright.core.given import Batch
from modelwright.core.gradients import finite_loss, text_loss
from modelwright.core.method import ModelMethod
from modelwright.core.model import Model
from modelwright.core.parts import alone, leaving_on_error, refuse_adapters, row_of
from modelwright.core.progress import bar
from modelwright.core.routing import distances, mode, shifted
from modelwright.core.settings import count, fraction, number
from modelwright.maths.allocation import moved_to_mean
from modelwright.maths.genetic import fittest


@dataclass(frozen=True, kw_only=True)
class Ftp(ModelMethod):
    """Let `skipped` of the tokens pass each block on average, chosen token by token; the weights stay as they are."""

    status: ClassVar[str] = "sketch"
    causal: ClassVar[bool] = True
    wants: ClassVar[frozenset[str]] = frozenset()
    drops: ClassVar[frozenset[str]] = frozenset({"float"})
    neutral = dict(skipped=0.0)
    small = dict(steps=3, population=2, generations=1, batch=2)

    skipped: float = fraction(0.2)  # of the tokens that pass a block, the mean over blocks
    population: int = count(12)  # schedules at once in the search
    generations: int = count(8, low=0)  # of schedules
    spread: float = number(0.3, low=0)  # of the noise that changes schedules
    hidden: int = count(16)  # inner width of a router
    steps: int = count(200, low=0)  # in which the routers learn
    batch: int = count(8, unit="sequences")  # in one step
    learning_rate: float = number(1e-2, low=1e-12)  # the highest
    guide: float = number(1.0, low=0)  # weight of the distance from the static choice in the loss
    balance: float = number(1.0, low=0)  # weight of the distance from the blocks' shares
    logits: float = number(1.0, low=0)  # weight of the distance from the whole model's predictions

    def model(self, model: Model, calibration: Sequence[Batch], rng: torch.Generator, notes: list[str]) -> Model:
        refuse_adapters(self, model)
        module = model.module
        if not self.skipped:
            return model
        ids, length = row_of(calibration, self.name())
        whole = finite_loss(model, calibration, self.name())
        routers = route_tokens(module, self.skipped, self.hidden, self.name())
        with leaving_on_error(routers):
            shares, static, mixed = self.learnt(model, routers, calibration, ids, length, rng)
            found = shifted(model, routers, calibration)
        after = text_loss(model, calibration)
        notes += [
            f"{self.name()}: shares of tokens that pass each block: {', '.join(f'{share:.3f}' for share in shares)}; on the calibration "
            f"text {', '.join(f'{share:.3f}' for share in found)}; the last step's losses {_shown(mixed)}",
            f"{self.name()}: the perplexity of the calibration text goes from {math.exp(whole):.6g} to {math.exp(min(after, 700)):.6g}; by "
            f"the static choice, which knows later tokens, {math.exp(min(static, 700)):.6g}",
            f"{self.name()}: tokens that pass are computed first and then left out, which saves no time here; keys and values of all "
            "tokens stay in the cache",
        ]
        return model

    def learnt(
        self, model: Model, routers: Sequence[TokenRouter], calibration: Sequence[Batch], ids: Tensor, length: int, rng: torch.Generator
    ) -> tuple[list[float], float, dict[str, float]]:
        """Draw routers, give them shares and let them learn; the shares, the loss of the static choice, and the last step's losses."""
        for router in routers:
            for value in router.parameters():
                value.data.copy_(torch.randn(value.shape, generator=rng) * (0.5 if value.ndim > 1 else 0.0))
        shares, static = self.schedule(model, routers, calibration, rng)
        if not self.steps:
            return shares, static, {}
        run = training.Training(
            tokens=self.steps * self.batch * length, batch=self.batch, length=length, learning_rate=self.learning_rate,
            weight_decay=0.0, seed=rng.initial_seed() % 2**31,
        )  # fmt: skip
        mine = [value for router in routers for value in router.parameters()]
        with alone(model.module, mine), bar(f"{self.name()}: routers", run.steps) as tick:
            return (
                shares,
                static,
                training.train(model.module, ids, run, lambda module, ids, mask: self.loss(module, routers, ids), report=lambda *_: tick()),
            )

    def schedule(
        self, model: Model, routers: Sequence[TokenRouter], calibration: Sequence[Batch], rng: torch.Generator
    ) -> tuple[list[float], float]:
        """Give each router the share that the search finds; all of them, and the loss of the static choice."""
        free = [router for router in routers if router.hidden]

        def loss(shares: Tensor) -> float:
            tick()
            for router, share in zip(free, shares.tolist(), strict=True):
                router.skipped = share
            with mode(routers, "static"):
                return text_loss(model, calibration)

        first = torch.tensor([router.skipped for router in free], dtype=torch.float64)
        even, mean = torch.ones_like(first), float(first.mean()) / MOST
        with bar(f"{self.name()}: shares", self.population * (self.generations + 1)) as tick:
            best, least = fittest(first, loss, lambda made: MOST * moved_to_mean(made / MOST, even, mean),
                                  self.population, self.generations, self.spread, rng)  # fmt: skip
        for router, share in zip(free, best.tolist(), strict=True):
            router.skipped = round(share, 6)
        return [router.skipped for router in routers], least

    def loss(self, module: nn.Module, routers: Sequence[TokenRouter], ids: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The scalar loss of routers on ids [batch, length], and its parts."""
        guide, balance, logits = distances(module, routers, ids)
        parts = {"guide": self.guide * guide, "balance": self.balance * balance, "logits": self.logits * logits}
        return torch.stack(list(parts.values())).sum(), {name: part.detach() for name, part in parts.items()}

    def passes(self, blocks: int) -> float:
        return self.population * (self.generations + 1) + 3 * self.steps * self.batch / 64 + 4  # a pass is of some 64 sequences or more

    def planned(self, module: Any, donors: int) -> Any:
        if self.skipped:
            route_tokens(module, self.skipped, self.hidden, self.name())
        return module


def _shown(parts: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.4f}" for name, value in parts.items()) or "none"

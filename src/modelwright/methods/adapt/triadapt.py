"""Train a low-rank update whose rank grows where it is used: TriAdaptLoRA.

Liang, Wang, Zeng 2025, arXiv:2501.08008, sections 3.2 and 3.3: ΔW = s · B C A with a square C that grows by a row and a column of blocks.
Every few steps the layers in which ‖C‖_F, over the number of pieces, has risen most since the last time grow by half of `rank`, as
many as are needed for the ranks' sum to come to `rank` for each layer at the end of the run.
Differs: s is alpha / rank from the start, and not over the rank that there is by now, so that growing changes no output. New
parameters join the optimizer's group of the others, so that schedules of the learning rate know them. When growing begins and how
often is not stated in the paper, and is ours. A and B both begin at random, as C is zero; the authors' file has B at zero too, so
that nothing would learn. The penalty for directions that are not orthogonal is off by default, where their config has a λ of 0.5.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, Self

import torch
from torch import Tensor

from modelwright.blocks.grown import Growing, Pieces
from modelwright.core.method import LayerAdapter
from modelwright.core.settings import count, fraction, number
from modelwright.core.training import Course
from modelwright.maths.low_rank import from_orthogonal
from modelwright.methods.adapt._mechanism import beyond


@dataclass(frozen=True, kw_only=True)
class Triadapt(LayerAdapter):
    """Begin with rank 1 everywhere, and give rank to the layers that use it while training; folds into the weight."""

    status: ClassVar[str] = "checked"
    sized_by: ClassVar[tuple[str, ...]] = ("rank",)
    suffices: ClassVar[frozenset[str]] = frozenset({"packed"})
    neutral = {}  # C begins at zero

    rank: int = count(8)  # of the layers at the end, in the mean
    first_rank: int = count(1)  # of every layer at first
    alpha: float = number(16.0, low=0)  # the update is scaled by alpha / rank
    begin_growing: float = fraction(0.1)  # the share of a run at which growing begins
    every: int = count(10, unit="steps")  # between two times that layers grow
    schedule: Literal["linear", "exponential"] = "linear"  # how the number of layers that grow follows the run
    orthogonality: float = number(0.0, low=0)  # λ of λ · mean(‖A Aᵀ - I‖ + ‖Bᵀ B - I‖), added to the loss

    def grown(self) -> Self:
        return replace(self, first_rank=self.rank)

    def problems(self) -> list[str]:
        return [f"first_rank is {self.first_rank} and rank {self.rank}, to which it is to grow. Give less."] * (
            isinstance(self.rank, int) and isinstance(self.first_rank, int) and self.first_rank > self.rank
        )

    def unfit(self, shape: tuple[int, ...]) -> str:
        return beyond(self.rank, shape)

    def part(self, weight: Tensor, bias: Tensor | None) -> Growing:
        rows, columns = weight.shape
        return Growing(Pieces(rows, columns, self.first_rank, self.alpha / self.rank), self.rank)

    def course(self, parts: Mapping[str, Growing], steps: int, seed: int) -> Growth:
        return Growth(self, list(parts.values()), steps, seed)


class Growth(Course):
    """Gives rank to parts in the course of a run."""

    def __init__(self, method: Triadapt, parts: list[Growing], steps: int, seed: int):
        self.method, self.parts, self.steps = method, parts, steps
        self.random = torch.Generator().manual_seed(seed)
        self.before = torch.zeros(len(parts))  # ‖C‖ over the pieces, when it was last looked at
        self.grown: list[Tensor] = []  # which parts grew, each time

    def penalty(self) -> Tensor | None:
        if not self.method.orthogonality:
            return None
        apart = [from_orthogonal(down) + from_orthogonal(up.T) for up, _, down in (part.update.parts() for part in self.parts)]
        return self.method.orthogonality * torch.stack(apart).mean()

    @torch.no_grad()
    def update(self, step: int) -> None:
        done, first = step + 1, round(self.method.begin_growing * self.steps)
        missing = sum(part.reference - sum(part.update.ranks) for part in self.parts)
        if done <= first or (done - first) % self.method.every or missing <= 0:
            return
        norms = torch.stack([part.update.core().norm() / len(part.update.ranks) for part in self.parts]).float().cpu()
        scores, self.before = norms - self.before, norms
        passed = (done - first) / (self.steps - first)
        number = int(missing * passed if self.method.schedule == "linear" else math.exp(passed * math.log(missing)))
        least = scores.sort(descending=True).values[min(max(number, 1), len(scores)) - 1]
        self.grow(scores >= least)

    def grow(self, chosen: Tensor) -> None:
        """Give these parts [parts] more rank."""
        for part in (self.parts[place] for place in chosen.nonzero().flatten().tolist()):
            first = part.update.downs[0]
            new = part.update.grow(max(1, part.reference // 2), self.random, first)
            for group in (group for optimizer in self.optimizers for group in optimizer.param_groups):
                if any(value is first for value in group["params"]):
                    group["params"].extend(new)
        self.grown.append(chosen)

    def state(self) -> dict[str, Tensor]:
        grown = torch.stack(self.grown) if self.grown else torch.zeros(0, len(self.parts), dtype=torch.bool)
        return {"before": self.before, "grown": grown, "random": self.random.get_state()}

    def resume(self, state: dict[str, Tensor]) -> None:
        for chosen in state["grown"]:
            self.grow(chosen)
        self.before = state["before"]
        self.random.set_state(state["random"])

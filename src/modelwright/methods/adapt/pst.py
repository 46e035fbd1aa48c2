"""Prune while training, with few parameters for what changes and for what goes: PST.

Li, Luo, Tan, Wang, Huang, Li, Bai 2022, arXiv:2205.11005, sections 3.2 and 3.3: y = x (mask ⊙ W_t)ᵀ + b with W_t = W + β U V. The mask
leaves out the lowest of S = |W_t| + α₁ A B + α₂ (R 1ᵀ + 1 C) and passes its gradient on to S. How many go rises by a cubic curve. W and
the biases stay as they are; putting the adapter into the weights writes mask ⊙ W_t.
Differs: the mask is found once for each step of the optimizer, and not in every pass. It takes no part of the gradient in evaluation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from modelwright.blocks.masked import Masked
from modelwright.core.method import LayerAdapter
from modelwright.core.settings import count, fraction, number
from modelwright.core.training import Course
from modelwright.maths.schedules import along, cubic
from modelwright.methods.adapt._mechanism import beyond


@dataclass(frozen=True, kw_only=True)
class Pst(LayerAdapter):
    """Zero most weights in the course of a training of few parameters; put into the weights it leaves a sparse model."""

    status: ClassVar[str] = "checked"
    sized_by: ClassVar[tuple[str, ...]] = ("rank", "score_rank")
    neutral = {}  # nothing is left out before a run, and V begins at zero

    sparsity: float = fraction(0.9)  # of each matrix at the end of the run
    rank: int = count(8)  # of the change of the weights
    score_rank: int = count(8)  # of the change of the scores
    scale: float = number(1.0)  # β, of the change of the weights
    score_product: float = number(1.0)  # α₁, of A B in the scores
    score_edges: float = number(1.0)  # α₂, of R and C in the scores
    begin: float = fraction(0.1)  # the share of a run after which weights go
    end: float = fraction(0.7)  # the share at which all have gone that are to go

    def problems(self) -> list[str]:
        return [f"begin is {self.begin} and end {self.end}. Give an earlier begin."] * (
            isinstance(self.begin, float) and isinstance(self.end, float) and self.begin > self.end
        )

    def unfit(self, shape: tuple[int, ...]) -> str:
        return beyond(max(self.rank, self.score_rank), shape)

    def part(self, weight: Tensor, bias: Tensor | None) -> Masked:
        rows, columns = weight.shape
        scales = self.scale, self.score_product, self.score_edges
        return Masked(rows, columns, self.rank, self.score_rank, scales, self.sparsity)

    def course(self, parts: Mapping[str, Masked], steps: int, seed: int) -> Sparsening:
        return Sparsening(list(parts.values()), steps, self.begin, self.end)


class Sparsening(Course):
    """Lets more and more entries of parts go, until the share `end` of a run."""

    def __init__(self, parts: list[Masked], steps: int, begin: float, end: float):
        self.parts, self.steps, self.span = parts, steps, (begin, end)

    def begin(self, step: int) -> None:
        self._leave(along(step / self.steps, *self.span))

    def finish(self) -> None:
        self._leave(1.0)

    @torch.no_grad()
    def _leave(self, passed: float) -> None:
        for part in self.parts:
            part.absent.fill_(int(cubic(passed, 0.0, part.sparsity) * part.size))

"""Remove heads and neurons in many small steps, fewer from blocks that turn their input most: Adapt-Pruner.

Pan et al. 2025, arXiv:2502.03460. In each of T steps a block's importance I is minus the mean cosine of what enters and
what leaves it, less the mean over blocks, over the largest size; its sparsity grows by 1/T - `amplitude`·I, and its heads and
neurons with the least effect on the loss (as in `prune.llm_pruner`) go until floor((1 - sparsity)·n) of the n at first
are left. The steps end when the share is reached.
Differs: importance is by the cosine alone; the authors' other distances have the wrong sign. The last step removes only what is
still over. Where the share is not reached in `steps` steps, as a block of the highest importance may never shrink, up to as many follow in
which all blocks grow alike. Training between the steps is `prune.adapt_accel`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from modelwright.anatomy._base import Units, refuse_turned
from modelwright.core.given import Batch
from modelwright.core.model import Model, unwrapped
from modelwright.core.passage import similarities_of_blocks
from modelwright.core.progress import track
from modelwright.core.settings import count, fraction, number
from modelwright.maths.allocation import keep_highest_of_all
from modelwright.methods.prune._units import loads_otherwise, refuse_not_finite, take_out
from modelwright.methods.prune.llm_pruner import LlmPruner

MOST = 0.99  # of a block that may go


@dataclass(frozen=True, kw_only=True)
class AdaptPruner(LlmPruner):
    """Take out heads and neurons step by step, looking anew at the gradient and at each block's work before each step."""

    status: ClassVar[str] = "checked"
    neutral = dict(share=0.0)
    small = dict(steps=4)

    share: float = fraction(0.3)  # of the units that go, by what they cost; one of each stays
    scope: Literal["model"] = "model"  # blocks lose by what they do
    spare_first: int = count(0, low=0, unit="blocks")  # at the start, left as they are
    spare_last: int = count(0, low=0, unit="blocks")  # at the end, left as they are
    steps: int = count(50)  # in which a block's sparsity would grow from 0 to 1
    amplitude: float = number(0.02, low=0)  # how much a block's importance changes its sparsity in a step

    def model(self, model: Model, calibration: Sequence[Batch], notes: list[str]) -> Model:
        module, why = unwrapped(model.module), ""
        refuse_turned(module)
        found = self.found(module, notes)
        first, total = {(units.kind, units.scope): units.count for units in found}, self.costs(module, found)
        gone = dict.fromkeys((units.depth for units in found), 0.0)
        for step in track(range(2 * self.steps), self.name()):
            found = self.found(module)
            over = self.costs(module, found) - (1 - self.share) * total
            if over <= 0:
                break
            amplitude = self.amplitude if step < self.steps else 0.0
            gone = grown(gone, similarities_of_blocks(model, calibration), 1 / self.steps, amplitude)
            with torch.no_grad():
                scores = self.scores(module, found, self.look(model, found, calibration))
                refuse_not_finite(found, scores)
            scores = [due(score, int(first[units.kind, units.scope] * (1 - gone[units.depth])))
                      for units, score in zip(found, scores, strict=True)]  # fmt: skip
            kept = keep_highest_of_all(scores, [self.cost(module, units) for units in found], over / self.costs(module, found))
            why = take_out(module, found, kept)
        if why:
            notes.append(loads_otherwise(self.name(), why))
        return model

    def costs(self, module: nn.Module, found: Sequence[Units]) -> float:
        """What all units cost."""
        return sum(self.cost(module, units) * units.count for units in found)


def grown(gone: dict[int | None, float], similarities: Sequence[float], step: float, amplitude: float) -> dict[int | None, float]:
    """The sparsities of blocks by depth, after one that grow by `step` on the mean, less where a block turns its input more."""
    found = importances(similarities, list(gone))
    return {depth: min(max(before + step - amplitude * found[depth], 0.0), MOST) for depth, before in gone.items()}


def due(score: Tensor, left: int) -> Tensor:
    """The scores [count] of a block's units with the `left` highest out of reach."""
    return score.index_fill(0, score.argsort(stable=True)[max(len(score) - left, 0) :], torch.inf)


def importances(similarities: Sequence[float], depths: Sequence[int | None]) -> dict[int | None, float]:
    """Of the blocks at these depths, minus the similarity less its mean, over the largest size; 0 when all are equal."""
    sizes = torch.tensor([-similarities[depth] for depth in depths if depth is not None], dtype=torch.float64)
    centred = sizes - sizes.mean()
    largest = centred.abs().max()
    return dict(zip(depths, (centred / largest if largest > 1e-12 else torch.zeros_like(centred)).tolist(), strict=True))

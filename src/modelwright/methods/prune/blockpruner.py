"""Remove attentions and MLPs one after the other, each time the one that the text's perplexity misses least: BlockPruner.

Zhong, Wan, Chen, Liang, Wu, Yang, Wang, Liu, Yu 2024, arXiv:2406.10594, section 3. At each step every attention or MLP that is
left (`mode`: mha, mlp, or mix for both) is taken out on trial with its norm. The notes list what went, in order: what is left
after any number of steps is what the method gives for that number.
Differs: a block that has lost both leaves whole. With `candidates`, only that many are ever tried, those of least influence:
1 - mean cosine of what leaves the block with and without them. The last attention of the first block's kind stays,
since caches read their length there.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import nn
from torch.nn.functional import cosine_similarity

from modelwright.anatomy import anatomy_of
from modelwright.anatomy._base import Branch
from modelwright.anatomy.removal import keeps_slot
from modelwright.blocks.removed import remove_branches, without
from modelwright.core.errors import PlanError
from modelwright.core.given import Batch
from modelwright.core.gradients import finite_loss
from modelwright.core.method import ModelMethod
from modelwright.core.model import Model, unwrapped
from modelwright.core.passage import Resident, real
from modelwright.core.progress import track
from modelwright.core.settings import count


@dataclass(frozen=True, kw_only=True)
class BlockPruner(ModelMethod):
    """Take out single attentions and MLPs, greedily by perplexity: finer than whole blocks, and slower to find."""

    status: ClassVar[str] = "checked"
    causal: ClassVar[bool] = True
    neutral = dict(branches=0)
    small = dict(branches=1, mode="mlp")

    branches: int = count(2, low=0, unit="attentions and MLPs")  # to remove
    mode: Literal["mha", "mlp", "mix"] = "mix"  # which may go: attentions, MLPs, or both
    candidates: int | None = count(None, unit="attentions and MLPs")  # of least influence, that are tried; all without it

    def problems(self) -> list[str]:
        few = self.candidates is not None and self.candidates < self.branches
        return [f"{self.branches} are to go, and candidates is {self.candidates}. Try at least as many."] if few else []

    def model(self, model: Model, calibration: Sequence[Batch], notes: list[str]) -> Model:
        module = unwrapped(model.module)
        left, gone, losses = self.found(module), list[Branch](), list[float]()
        if self.candidates is not None:
            influence = influences(model, left, calibration)
            lowest = sorted(left, key=lambda branch: influence[branch])[: self.candidates]
            left = [branch for branch in left if branch in lowest]
        with contextlib.ExitStack() as taken:
            for _ in track(range(self.branches), self.name()):
                losses_without = {}
                for branch in left:
                    if keeps_slot(module, [branch]):
                        with without(module, branch):
                            losses_without[branch] = finite_loss(model, calibration, f"{self.name()} without {branch}")
                if not losses_without:
                    raise self.none_left(len(gone))
                least = min(losses_without, key=lambda branch: losses_without[branch])
                taken.enter_context(without(module, least))
                left.remove(least)
                gone.append(least)
                losses.append(losses_without[least])
        remove_branches(module, gone)
        shown = ", ".join(f"{branch} ({math.exp(min(loss, 700)):.6g})" for branch, loss in zip(gone, losses, strict=True))
        notes.append(f"{self.name()} removed, in this order, with the perplexity of the text after each: {shown or 'nothing'}")
        return model

    def found(self, module: nn.Module) -> list[Branch]:
        """What may go, in the order of the blocks."""
        kinds = {"mha": ("attn",), "mlp": ("mlp",), "mix": ("attn", "mlp")}[self.mode]
        return [branch for branch in anatomy_of(module).branches(module) if branch.kind in kinds]

    def none_left(self, gone: int) -> PlanError:
        return PlanError(f"{self.name()}: {self.branches} were to go, and after {gone} no other can. Remove fewer, or use another mode.")

    def planned(self, module: Any, donors: int) -> Any:
        gone: list[Branch] = []
        for branch in reversed(self.found(module)):
            if len(gone) < self.branches and keeps_slot(module, [*gone, branch]):
                gone.append(branch)
        if len(gone) < self.branches:
            raise self.none_left(len(gone))
        remove_branches(module, gone)
        return module


@torch.no_grad()
def influences(model: Model, branches: Sequence[Branch], calibration: Sequence[Batch]) -> dict[Branch, float]:
    """For each, 1 - the mean over tokens of the cosine of what leaves its block with it and without."""
    walk, found = Resident(model), {}
    walk.enter(calibration)
    for depth in range(walk.depths):
        after = list(walk.run_block(depth))
        whole = torch.cat([real(out, mask) for out, mask in zip(after, walk.masks, strict=True)])
        for branch in [branch for branch in branches if branch.depth == depth]:
            with without(walk.module, branch):
                part = torch.cat([real(out, mask) for out, mask in zip(walk.run_block(depth), walk.masks, strict=True)])
            found[branch] = 1 - float(cosine_similarity(whole.float(), part.float(), dim=-1).mean())
        walk.states = after
    return found

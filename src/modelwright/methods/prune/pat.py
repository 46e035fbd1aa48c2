"""Learn while tuning which channels of the stream between the blocks may go, and mix the others: pruning-aware tuning (PAT).

Liu et al. 2024, arXiv:2408.14721. Behind the embedding, each attention and each MLP stands v ⊙ m ⊙ (x + L1 L0 x), which is x at
first. The mask m is one for all places; its logits a move towards 1/2 and -1/2, so that as many as shall stay are positive
(`maths.channel_masks`). From `settled` of the run on the highest stay, and m is 1 or 0. Each L0 is drawn to orthogonal rows, so
that v alone scales. Low-rank updates train beside the frozen matrices of the blocks. At the end all of it goes into the
weights, the other channels leave, and the model is a plain one of less width.
Differs: once settled, m is what it will be; the authors keep the last soft one, which in short runs is far from it. v is
merged, which their script forgets. The losses of all L0 are added. A head that is tied to the embedding comes apart. The
defaults suit a run of some hundred steps; the authors take 10,000 of 128 times 256 tokens at a rate of 5e-5 and settle at 0.8.
Models whose norms subtract a mean are left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from modelwright.anatomy import anatomy_of
from modelwright.anatomy._rotation import untie
from modelwright.anatomy.removal import remove_units
from modelwright.core.beside import Beside
from modelwright.core.errors import PlanError
from modelwright.core.method import TrainMethod
from modelwright.core.settings import count, fraction, number
from modelwright.core.training import Course, Training, next_token
from modelwright.maths.channel_masks import not_orthogonal, sharp_mask, too_many, undecided
from modelwright.methods.prune._channels import Mixing, Narrower, parts_of


@dataclass(frozen=True, kw_only=True)
class Pat(Narrower, TrainMethod):
    """Tune to the text while the model learns to do with fewer channels; every matrix shrinks, and the result is plain."""

    status: ClassVar[str] = "checked"
    drops: ClassVar[frozenset[str]] = frozenset({"sparse"})
    small = dict(tokens=256, batch=2, length=16, mixing=8)
    fails = {"ties_survive": "what mixes the embedding's channels goes into the embedding and not into the head"}

    mixing: int = count(200)  # rows of L0, columns of L1
    settled: float = fraction(0.5)  # of the run, from where on the channels are chosen
    rank: int = count(20)  # of the updates beside the matrices
    alpha: float = number(4.0, low=0)  # the update is scaled by alpha / rank
    clip: float = number(0.3, low=0)  # the largest norm of the gradient; 0 for none
    weight_decay: float = number(0.0, low=0)  # of matrices only

    def problems(self) -> list[str]:
        return ["settled is below 0.5, while the mask is still half open. Let it be later."] * (self.settled < 0.5)

    def loss(self, module: nn.Module, ids: Tensor, mask: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        text, _ = next_token(module, ids, mask)
        chosen, mixed = parts_of(module)
        logits = chosen.logits.detach() if chosen.settled else chosen.logits
        parts = {
            "text": text,
            "width": too_many(logits, chosen.after) + undecided(logits),
            "rotation": torch.stack([not_orthogonal(part.down) for part in mixed]).sum(),
        }
        return torch.stack(list(parts.values())).sum(), {name: part.detach() for name, part in parts.items()}

    def course(self, module: nn.Module, settings: Training, notes: list[str]) -> Narrowing:
        return Narrowing(self, module, settings, notes)

    def width(self, module: nn.Module) -> tuple[int, int]:
        before, after = super().width(module)
        if self.mixing > before:
            raise PlanError(f"{self.name()}: no {self.mixing} rows of {before} are orthogonal. Let mixing be {before // 4} or less.")
        return before, after

    def planned(self, module: Any, donors: int) -> Any:
        untie(module)
        _, after = self.width(module)
        remove_units(module, "residual", range(after), plain=False)
        return module


class Narrowing(Course):
    """A stream that becomes narrower."""

    def __init__(self, method: Pat, module: nn.Module, settings: Training, notes: list[str]):
        self.method, self.module, self.notes = method, module, notes
        _, after = method.width(module)
        sites = [site for site in anatomy_of(module).sites(module) if site.role.startswith(("attn.", "mlp."))]
        self.mixing = Mixing(module, method.mixing, after, settings.steps, method.settled, settings.seed)
        untie(module)
        try:
            self.beside = Beside(module, sites, rank=method.rank, alpha=method.alpha, dropout=0.0, seed=settings.seed + 1)
        except BaseException:
            self.mixing.remove()
            raise
        for part in (self.mixing.chosen, *self.mixing.mixed.values()):
            part.requires_grad_(True)

    def begin(self, step: int) -> None:
        self.mixing.chosen.step = step

    def finish(self) -> None:
        logits, after = self.mixing.chosen.logits.detach(), self.mixing.chosen.after
        self.beside.fold()
        self.mixing.fold()
        self.leave()
        kept = sharp_mask(logits, after).nonzero()[:, 0].tolist()
        positive = int((logits > 0).sum())
        self.notes.append(f"{self.method.name()}: {after} of {len(logits)} channels stay; {positive} were chosen in training")
        self.method.narrowed(self.module, kept, self.notes)

    def leave(self) -> None:
        self.mixing.remove()
        self.beside.remove()

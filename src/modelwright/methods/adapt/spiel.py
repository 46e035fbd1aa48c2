"""Train few entries of each frozen matrix, and move them now and then to where the gradient is large: SpIEL.

Ansell, Vulić, Sterz, Korhonen, Ponti 2024, arXiv:2401.16405, section 3, and the authors' code. Of ΔW k entries are stored, their values v,
zero at first, and their positions, at random at first. In every cycle of `every` steps, after `gather` of them, those with the smallest
|v| are dropped and as many others begin at zero: all of them the first time, later a share that falls from `replaced` to none.
By `gradient` (AG) the k positions of the largest |g| in the first backward pass of a cycle are candidates, Σg and Σg² are gathered for
them, the largest |Σg| grow, and their moments in Adam begin with (Σg/n)(1 - β₁^a) and (Σg²/n)(1 - β₂^a) for the a = `gather` steps.
By `momentum` (MA) SM3 is the optimizer, and those inactive grow whose numbers of row and column have the largest product.
Differs: both choices fall on the same steps. The density is that of each chosen matrix. With `replaced` 0 the first choice stays,
by gradients over `gather` steps (as LT-SFT and FISH masks are static). The update is a product beside the layer's own, so that it also
stands on packed weights and on other adapters. Weight decay, which the authors set to 1 to 30, is `train`'s, and acts on v.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from modelwright.blocks.reparametrised import Reparametrised, Scatter
from modelwright.core.aged_adamw import AgedAdamW
from modelwright.core.errors import ModelError
from modelwright.core.method import LayerAdapter
from modelwright.core.settings import count, fraction
from modelwright.core.sm3 import Sm3
from modelwright.core.training import Course, Training
from modelwright.maths import places


@dataclass(frozen=True, kw_only=True)
class Spiel(LayerAdapter):
    """Change a small share of each matrix's weights, which the training itself chooses; folds into the weight, at any rank."""

    status: ClassVar[str] = "checked"
    sized_by: ClassVar[tuple[str, ...]] = ("trained",)
    suffices: ClassVar[frozenset[str]] = frozenset({"packed"})
    neutral = {}  # v starts at zero
    small = dict(trained=0.05, every=4, gather=2)

    trained: float = fraction(0.01)  # of each matrix's weights, at least one of them
    grow: Literal["gradient", "momentum"] = "gradient"  # what is largest where new entries begin: gradients' sum, or SM3's estimate
    every: int = count(20, unit="steps")  # from one choice of entries to the next
    gather: int = count(5, unit="steps")  # at the start of each cycle, before the choice
    replaced: float = fraction(0.2)  # of the entries, at most, by each choice after the first

    @classmethod
    def sized(cls, size: int) -> dict[str, Any]:
        return {"trained": min(1.0, size / 1024)}

    def problems(self) -> list[str]:
        return ["gather is above every, and a cycle has no more steps. Let it be at most every."] * (self.gather > self.every)

    def part(self, weight: Tensor, bias: Tensor | None) -> Reparametrised:
        rows, columns = weight.shape
        number = max(1, round(self.trained * weight.numel()))
        at = places.drawn(weight.numel(), number, weight)
        return Reparametrised(scatter=Scatter((rows, columns), at, nn.Parameter(torch.zeros(number))))

    def course(self, parts: Mapping[str, Reparametrised], steps: int, seed: int) -> Reselecting:
        return Reselecting(self, [part.scatter for part in parts.values() if part.scatter is not None], steps)


class Reselecting(Course):
    """Entries that are moved in the course of a run.

    gathered: by the number of a matrix its candidates, Σg and Σg² of these, and how many backward passes they are of.
    """

    def __init__(self, method: Spiel, scatters: list[Scatter], steps: int):
        self.method, self.scatters, self.steps = method, scatters, steps
        self.gathered: dict[int, list[Tensor]] = {}

    def own_optimizers(self, settings: Training) -> list[torch.optim.Optimizer]:
        values, rate, decay = [scatter.values for scatter in self.scatters], settings.learning_rate, settings.weight_decay
        if self.method.grow == "gradient":
            return [AgedAdamW(values, rate, settings.betas, weight_decay=decay)]
        return [Sm3(values, rate, weight_decay=decay, entries={one.values: (one.shape, one.places) for one in self.scatters})]

    def start(self) -> None:
        if self.method.grow == "momentum" and not all(isinstance(self.holder(one.values), Sm3) for one in self.scatters):
            raise ModelError(f"{self.method.name()}: grow: momentum reads SM3's state, and the run has none. Use core.sm3.Sm3.")

    def holder(self, value: Tensor) -> Any:
        """The optimizer that moves a parameter."""
        held = ((one, other) for one in self.optimizers for group in one.param_groups for other in group["params"])
        return next((one for one, other in held if other is value), None)

    def begin(self, step: int) -> None:
        if self.method.grow == "gradient" and step % self.method.every < self.method.gather:
            for number, scatter in enumerate(self.scatters):
                scatter.watch = lambda whole, number=number: self.watch(number, whole)

    def watch(self, number: int, whole: Tensor) -> None:
        """Look at a matrix's gradient [out · in], in one backward pass."""
        if number not in self.gathered:
            at = places.largest(lambda part: whole[part].abs(), len(whole), len(self.scatters[number].values))
            self.gathered[number] = [at, torch.zeros_like(whole[at]), torch.zeros_like(whole[at]), whole.new_zeros(())]
        at, total, squares, passes = self.gathered[number]
        total += whole[at]
        squares += whole[at].square()
        passes += 1

    @torch.no_grad()
    def update(self, step: int) -> None:
        if step % self.method.every == self.method.gather - 1:
            share = 1.0 if step < self.method.every else self.method.replaced * (1 - step / self.steps)
            self.leave()
            for number, scatter in enumerate(self.scatters):
                self.choose(number, scatter, int(share * len(scatter.values)))
            self.gathered.clear()

    def choose(self, number: int, scatter: Scatter, going: int) -> None:
        """Let the smallest entries of a matrix go for the best others; one that goes and comes at once stays as it is."""
        values, now = scatter.values, scatter.places
        entries, found = scatter.shape[0] * scatter.shape[1], self.gathered.get(number)
        if self.method.grow == "momentum":
            going = min(going, entries - len(now))
        elif found is None:
            return
        slots = values.abs().topk(going, largest=False).indices
        if found is None:
            rows, columns = self.holder(values).numbers(values)
            grown, best = places.largest(lambda part: inactive(rows, columns, now, part), entries, going), slots
        else:
            stays = torch.ones_like(now, dtype=torch.bool).index_fill_(0, slots, False)
            best = found[1].abs().masked_fill(torch.isin(found[0], now[stays]), -1).topk(going).indices
            grown = found[0][best]
        slots, fresh = slots[~torch.isin(now[slots], grown)], ~torch.isin(grown, now[slots])
        now[slots], values[slots] = grown[fresh], 0
        optimizer = self.holder(values)
        if found is not None and isinstance(optimizer, AgedAdamW):
            mean, square = (total[best[fresh]] / found[3] for total in found[1:3])
            optimizer.replace(values, slots, mean, square, self.method.gather)
        elif optimizer is not None and not isinstance(optimizer, Sm3):  # one of another loop: what it knew of the entries that went
            for state in optimizer.state[values].values():
                if isinstance(state, Tensor) and state.shape == values.shape:
                    state[slots] = 0

    def leave(self) -> None:
        for scatter in self.scatters:
            scatter.watch = None

    def state(self) -> dict[str, Tensor]:
        return {f"{number}.{part}": value for number, found in self.gathered.items() for part, value in enumerate(found)}

    def resume(self, state: dict[str, Tensor]) -> None:
        numbers = sorted({int(name.partition(".")[0]) for name in state})
        self.gathered = {number: [state[f"{number}.{part}"].clone() for part in range(4)] for number in numbers}


def inactive(rows: Tensor, columns: Tensor, now: Tensor, part: slice) -> Tensor:
    """A slice of the products of numbers of rows [out] and columns [in], row after row, below all others where an entry is."""
    at = torch.arange(part.start, part.stop, device=rows.device)
    score = rows[at // len(columns)] * columns[at % len(columns)]
    score[now[(now >= part.start) & (now < part.stop)] - part.start] = -1
    return score

"""Go on with pretraining while the units that matter least leave, a few at a time: EfficientLLM.

Xing et al. 2025, arXiv:2502.06663. A unit's saliency is the sum of its weights' effects on the loss, added up over the last `every`
steps from the gradients of training. Then the units of least saliency go; what stays of each matrix that read their outputs
takes over what it can: with the columns M gone and H the moment of its inputs, ΔW = -W_M ([H⁻¹]_MM)⁻¹ [H⁻¹]_M. Training goes on
with AdamW, and the architecture is what is left.
Differs: the authors have published no code, so that details are our own: the shares of the kinds are equal and rise on a straight
line to `end`; the moment is a moving average (0.9 old) over batches; the Fisher information of `mix` is the square of the batch's
gradient. With `scope: block` each block loses the least of its own, so that widths stay equal. Units that went are zeros until the
run ends, when they are cut out: what stays learns the same, but no step becomes faster on the way. Whole blocks do not go.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from modelwright.anatomy import Site, anatomy_of
from modelwright.anatomy._base import Span, Units, input_dim
from modelwright.core.settings import count, fraction
from modelwright.core.training import Training
from modelwright.maths.second_order import without_columns
from modelwright.methods.prune._going import Going, Shrinker

OLD = 0.9  # what a moment keeps of itself at each batch


@dataclass(frozen=True, kw_only=True)
class EfficientLlm(Shrinker):
    """Pretrain on while heads, neurons or channels leave one after the other; for runs long enough to heal each cut."""

    status: ClassVar[str] = "checked"
    kinds: ClassVar[tuple[str, ...]] = ("mlp", "heads", "residual")
    small = dict(tokens=256, batch=2, length=16, every=1)

    end: float = fraction(0.5)  # of the run, until which units go; the rest lets the model settle
    every: int = count(10, unit="steps")  # between two times that units go
    damp: float = fraction(0.01)  # of the mean diagonal, added to the diagonal of a moment before it is inverted

    def updates(self, steps: int) -> dict[int, float]:
        """The share gone after each step (from 0) at whose end units go; none where `every` is beyond `end`."""
        times = [number * self.every - 1 for number in range(1, int(self.end * steps + 1e-9) // self.every + 1)]
        return {step: self.share * number / len(times) for number, step in enumerate(times, 1)}

    def course(self, module: nn.Module, settings: Training, notes: list[str]) -> Shrinking:
        return Shrinking(self, module, settings, notes)


class Shrinking(Going):
    """Units that go while all weights train."""

    def __init__(self, method: EfficientLlm, module: nn.Module, settings: Training, notes: list[str]):
        super().__init__(method, module, notes)
        self.method, self.times = method, method.updates(settings.steps)
        if not self.times:
            notes.append(
                f"{method.name()}: no unit goes, since `every` is {method.every} and `end` comes before that many of {settings.steps} steps"
            )
        self.step, self.last = 0, max(self.times, default=-1)
        device = next(module.parameters()).device
        self.readers = [readers(module, units) for units in self.found]
        sizes = {site.name: module.get_parameter(site.name).shape[span.dim] for each in self.readers for site, span in each}
        self.moments = {name: torch.zeros(size, size, device=device) for name, size in sizes.items()}
        layers = {site.name: module.get_submodule(site.module) for each in self.readers for site, _ in each}
        self.handles = [layer.register_forward_pre_hook(self.counter(name)) for name, layer in layers.items()]

    def counter(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def add(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            if self.step <= self.last:
                x = args[0].detach().flatten(0, -2).float()
                self.moments[name].mul_(OLD).addmm_(x.T, x, alpha=(1 - OLD) / len(x))

        return add

    def begin(self, step: int) -> None:
        self.step = step

    @torch.no_grad()
    def gradient(self, step: int) -> None:
        super().gradient(step)
        if step <= self.last:
            for score, now in zip(self.scores, self.saliency(), strict=True):
                score += now

    @torch.no_grad()
    def update(self, step: int) -> None:
        super().update(step)  # of what the optimizer's momentum did to units that went, nothing is to be made up for
        if step in self.times:
            for number in self.go(self.method.kept(self.module, self.found, self.left(), self.times[step])):
                self.make_up(number)
            for score in self.scores:
                score.zero_()
            self.silence()

    def make_up(self, number: int) -> None:
        """Change what stays of the matrices that read the units of an entry for what goes."""
        for site, span in self.readers[number]:
            weight = self.module.get_parameter(site.name)
            gone = torch.zeros(weight.shape[span.dim], dtype=torch.bool, device=weight.device)
            gone[span.start : span.start + len(self.stays[number]) * span.width] = ~self.stays[number].repeat_interleave(span.width)
            made = without_columns(weight.T if site.transposed else weight, self.moments[site.name], gone, self.method.damp)
            weight.copy_(made.T if site.transposed else made)

    def state(self) -> dict[str, Tensor]:
        return super().state() | {f"moments.{name}": value for name, value in self.moments.items()}


def readers(module: nn.Module, units: Units) -> list[tuple[Site, Span]]:
    """The matrices whose inputs the units are; an embedding, and experts in a stack, are none."""
    sites = {site.name: site for site in anatomy_of(module).sites(module) if site.role != "embed" and not site.stack}
    return [(site, span) for span in units.spans if (site := sites.get(span.name)) and span.dim == input_dim(site)]

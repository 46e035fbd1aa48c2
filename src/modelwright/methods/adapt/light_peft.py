"""Train an adapter while masks learn which heads and neurons it needs, then take out the others and most of the adapter: Light-PEFT.

Gu et al. 2024, arXiv:2406.03792, section 3, and the authors' code. A number for each head multiplies what the attention reads, one for each
neuron its activation; all begin at 1 and pay λ |m|. In the second half of the run the mean over tokens of ‖s B A x‖ / ‖W x‖ weighs each
layer's update, and |mean(A_j ⊙ dA_j)| + |mean(B_j ⊙ dB_j)| each of its ranks. At the end leave the heads with the lowest masks of each
block, the neurons with the lowest of all blocks, the updates that weigh least, and of the others the ranks that weigh least, with the rows
and columns of units that left. What stays keeps its values, and masks are forgotten. Put `train` behind it: their second phase.
What stays of which units is in the config of the base, `units_kept`, so that `core.adapters.restored` puts the adapter on the whole model.
Differs: query heads go with their key-value head. One unit of each block, one update and one of its ranks stay. Masks learn at the
adapter's rate, as in the authors' scripts.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from modelwright.anatomy import Units, anatomy_of
from modelwright.core import adapters
from modelwright.core.errors import SiteError
from modelwright.core.method import TrainMethod
from modelwright.core.model import unwrapped
from modelwright.core.settings import count, fraction, number
from modelwright.core.training import Training, Zeros, next_token
from modelwright.maths.allocation import keep_highest, keep_highest_of_all


@dataclass(frozen=True, kw_only=True)
class LightPeft(TrainMethod):
    """Make a model with a LoRA adapter smaller before it is tuned: fewer heads and neurons, and an adapter of what mattered."""

    status: ClassVar[str] = "checked"
    wants: ClassVar[frozenset[str]] = frozenset({"float", "adapters"})
    changes_base: ClassVar[bool] = True
    small = dict(tokens=256, batch=2, length=16)

    heads: float = fraction(1 / 3)  # of each block's heads that go
    neurons: float = fraction(1 / 3)  # of all blocks' neurons that go
    updates: float = fraction(0.75)  # of the layers' updates that go
    ranks: float = fraction(0.5)  # of the ranks of the updates that stay that go
    l1: float = number(1e-4, low=0)  # λ
    tokens: int = count(6_553_600, unit="tokens")  # seen in all, repeats too
    batch: int = count(32, unit="sequences")  # in one step
    learning_rate: float = number(3e-4, low=0)  # the highest

    def loss(self, module: nn.Module, ids: Tensor, mask: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return next_token(module, ids, mask)

    def course(self, module: nn.Module, settings: Training, notes: list[str]) -> Estimating:
        return Estimating(self, module, settings.steps, notes)

    def found(self, module: nn.Module, notes: list[str]) -> list[Units]:
        """The heads and neurons of which some may go, in a model whose adapter is off."""
        found = []
        for kind, share in (("heads", self.heads), ("mlp", self.neurons)):
            try:
                found += anatomy_of(module).units(module, kind) if share else []
            except SiteError as error:
                notes.append(f"{self.name()} left one kind alone: {error}")
        return found

    def stays(self, found: list[Units], masks: list[Tensor]) -> list[list[int]]:
        """Which units of each entry stay."""
        kept = [keep_highest(mask, self.heads) for units, mask in zip(found, masks, strict=True) if units.kind == "heads"]
        neurons = [mask for units, mask in zip(found, masks, strict=True) if units.kind == "mlp"]
        return kept + (keep_highest_of_all(neurons, [1.0] * len(neurons), self.neurons) if neurons else [])

    def left(self, weighs: Tensor, ranks: Mapping[str, Tensor]) -> dict[str, list[int]]:
        """The ranks that stay of each update, by the path of its layer; none where the whole update goes."""
        paths = list(ranks)
        best = [paths[place] for place in keep_highest(weighs, self.updates)]
        flat = torch.cat([ranks[path] for path in best])
        owner = [(path, place) for path in best for place in range(len(ranks[path]))]
        kept = [owner[place] for place in keep_highest(flat, self.ranks)]
        return {path: [place for one, place in kept if one == path] for path in paths}

    def planned(self, module: Any, donors: int) -> Any:
        base = unwrapped(module)
        with adapters.plain_layers(base) as bearers:
            found = self.found(base, [])
        ranks = {path: torch.zeros(rank) for path, rank in adapters.ranks_of(bearers).items()}
        masks = [torch.arange(units.count) / units.count for units in found]
        adapters.shrink(base, found, self.stays(found, masks), self.left(torch.zeros(len(ranks)), ranks))
        return module


class Estimating(Zeros):
    """Masks of units that learn, and how much each update and its ranks weigh."""

    def __init__(self, method: LightPeft, module: nn.Module, steps: int, notes: list[str]):
        super().__init__(module.parameters())
        self.method, self.module, self.steps, self.notes = method, module, steps, notes
        with adapters.plain_layers(module) as self.bearers:
            self.found = method.found(module, notes)
        device, sizes = next(module.parameters()).device, adapters.ranks_of(self.bearers)
        self.masks: list[Tensor] = [nn.Parameter(torch.ones(units.count, device=device)) for units in self.found]
        self.weighs = torch.zeros(len(sizes), device=device)
        self.ranks = {path: torch.zeros(rank, device=device) for path, rank in sizes.items()}
        self.recording, self.hooks = False, ExitStack()

    def own_optimizers(self, settings: Training) -> list[torch.optim.Optimizer]:
        return [torch.optim.AdamW(self.masks, settings.learning_rate, settings.betas, weight_decay=0.0)] if self.masks else []

    def start(self) -> None:
        super().start()
        for units, mask in zip(self.found, self.masks, strict=True):
            name = next(span.name for span in units.spans if span.output)
            layer = self.module.get_submodule(name.removesuffix(".weight"))
            self.hooks.callback(layer.register_forward_pre_hook(lambda _, args, mask=mask: (masked(args[0], mask), *args[1:])).remove)
        for place, path in enumerate(self.ranks):
            layer, own = self.bearers[path], list[Tensor]()
            self.hooks.callback(layer.get_base_layer().register_forward_hook(lambda _, args, out, own=own: own.append(out.detach())).remove)
            self.hooks.callback(layer.register_forward_hook(lambda _, args, out, own=own, at=place: self.weigh(at, own.pop(), out)).remove)

    @torch.no_grad()
    def weigh(self, place: int, own: Tensor, out: Tensor) -> None:
        """Note how large an update's outputs are beside the layer's own."""
        if self.recording:
            self.weighs[place] += ((out - own).float().norm(dim=-1) / own.float().norm(dim=-1)).nan_to_num(0, 0, 0).mean()

    def begin(self, step: int) -> None:
        self.recording = step >= self.steps // 2

    def penalty(self) -> Tensor | None:
        return self.method.l1 * torch.cat(self.masks).abs().sum() if self.masks else None

    @torch.no_grad()
    def gradient(self, step: int) -> None:
        super().gradient(step)
        for path, total in self.ranks.items() if self.recording else ():
            down, up = adapters.factors_of(self.bearers[path])
            if down.grad is not None and up.grad is not None:  # the layer saw tokens
                total += ((down * down.grad).mean(1).abs() + (up * up.grad).mean(0).abs()).nan_to_num(0, 0, 0)

    def finish(self) -> None:
        self.leave()
        kept = self.method.stays(self.found, [mask.detach().abs() for mask in self.masks])
        why = adapters.shrink(self.module, self.found, kept, self.method.left(self.weighs, self.ranks))
        if why:
            self.notes.append(f"{self.method.name()}: {why}; so the model loads after `import modelwright`, and not in plain transformers")

    def leave(self) -> None:
        self.hooks.close()

    def state(self) -> dict[str, Tensor]:
        return {str(number): value.detach() for number, value in enumerate([*self.masks, self.weighs, *self.ranks.values()])}


def masked(inputs: Tensor, mask: Tensor) -> Tensor:
    """What a layer is given by units [..., units · width], times the mask of each."""
    return inputs * mask.to(inputs.dtype).repeat_interleave(inputs.shape[-1] // len(mask))

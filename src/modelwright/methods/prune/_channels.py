"""A narrower stream between the blocks: how wide it becomes, and parts that choose and mix its channels while they train."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from modelwright.anatomy import anatomy_of
from modelwright.anatomy._rotation import stream_of
from modelwright.anatomy.removal import remove_units
from modelwright.core.errors import LayoutError, PlanError
from modelwright.core.method import Method
from modelwright.core.settings import count, fraction
from modelwright.maths.channel_masks import sharp_mask, soft_mask
from modelwright.methods.prune._units import loads_otherwise

NAME = "channels"  # of the parts that the model bears


@dataclass(frozen=True, kw_only=True)
class Narrower(Method):
    """Makes the stream narrower."""

    keep: float = fraction(0.75, low=1e-3)  # of the width of the hidden states
    multiple: int = count(8, unit="channels")  # the width is rounded down to a multiple of this

    def width(self, module: nn.Module) -> tuple[int, int]:
        """The width before, and as it will be.

        Raises:
            PlanError: nothing would be left.
        """
        before = stream_of(module).count
        after = before if self.keep == 1 else int(self.keep * before) // self.multiple * self.multiple
        if not after:
            raise PlanError(
                f"{self.name()}: keep={self.keep:g} of {before} channels is less than one multiple of {self.multiple}. Keep more."
            )
        return before, after

    def narrowed(self, module: nn.Module, kept: Iterable[int], notes: list[str]) -> None:
        """Take out the other channels, and note it where plain transformers cannot load the result."""
        if why := remove_units(module, "residual", list(kept), plain=False).why_not_plain:
            notes.append(loads_otherwise(self.name(), why))


class Chosen(nn.Module):
    """Which channels stay: one mask for all places, soft while it is learnt, and 1 or 0 once it is settled."""

    def __init__(self, width: int, after: int, steps: int, settled: float, device: torch.device):
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(width, device=device))
        self.after = after  # how many stay
        self.step, self.steps, self.last = 0, steps, settled * steps

    @property
    def settled(self) -> bool:
        """Whether the logits learn no more."""
        return self.step >= self.last

    def mask(self) -> Tensor:
        """[width]."""
        return sharp_mask(self.logits, self.after) if self.settled else soft_mask(self.logits, self.step, self.steps)


class Mixed(nn.Module):
    """scale ⊙ mask ⊙ (x + up · down · x) of what is written to the stream; nothing but the mask at first."""

    def __init__(self, width: int, rank: int, device: torch.device):
        super().__init__()
        self.down = nn.Parameter(torch.empty(rank, width).uniform_(-(width**-0.5), width**-0.5).to(device))
        self.up = nn.Parameter(torch.zeros(width, rank, device=device))
        self.scale = nn.Parameter(torch.ones(width, device=device))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return (self.scale * mask).to(x.dtype) * (x + x @ self.down.to(x.dtype).T @ self.up.to(x.dtype).T)

    def matrix(self) -> Tensor:
        """What it multiplies by, without the mask [width, width]."""
        return self.scale[:, None] * (torch.eye(len(self.scale), device=self.scale.device) + self.up @ self.down)


class Mixing:
    """A `Mixed` behind everything that writes to the stream: the embedding, each attention and each MLP; one `Chosen` for all.

    Raises SiteError where something else writes to it, or channels cannot leave; then nothing has changed.
    """

    def __init__(self, module: Any, rank: int, after: int, steps: int, settled: float, seed: int):
        units, device = stream_of(module), next(module.parameters()).device
        writes = [span for span in units.spans if span.output]
        embedding = next(path for path, part in module.named_modules() if part is module.get_input_embeddings())
        paths = [embedding, *(branch.module for branch in anatomy_of(module).branches(module))]
        self.writes = [(path, span) for span in writes for path in paths if span.name.startswith(f"{path}.")]
        if alone := [span.name for span in writes if all(span is not other for _, other in self.writes)]:
            raise LayoutError(f"There are no channels to remove: {alone[0]} writes to the stream outside embeddings, attentions and MLPs.")
        self.module, self.chosen = module, Chosen(units.count, after, steps, settled, device)
        self.mixed: dict[str, Mixed] = {}
        self._handles = []
        module.add_module(NAME, self.chosen)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            for path in paths:
                place = module.get_submodule(path)
                self.mixed[path] = Mixed(units.count, rank, device)
                place.add_module(NAME, self.mixed[path])
                self._handles.append(place.register_forward_hook(self._mix))

    def _mix(self, place: nn.Module, _: Any, out: Any) -> Any:
        part, mask = getattr(place, NAME), self.chosen.mask()
        return (part(out[0], mask), *out[1:]) if isinstance(out, tuple) else part(out, mask)

    @torch.no_grad()
    def fold(self) -> None:
        """Put what mixes and scales into the matrices and biases before it; the mask is left out."""
        for path, span in self.writes:
            weight = self.module.get_parameter(span.name)
            turned = weight.double().movedim(span.dim, -1) @ self.mixed[path].matrix().double().T
            weight.copy_(turned.movedim(-1, span.dim))

    def remove(self) -> None:
        """Take all parts away; a second time does nothing."""
        for handle in self._handles:
            handle.remove()
        for place in (self.module, *(self.module.get_submodule(path) for path in self.mixed)):
            place._modules.pop(NAME, None)
        self._handles = []


def parts_of(module: nn.Module) -> tuple[Chosen, list[Mixed]]:
    """What a model bears."""
    mixed = [part for part in module.modules() if isinstance(part, Mixed)]
    return next(part for part in module.modules() if isinstance(part, Chosen)), mixed

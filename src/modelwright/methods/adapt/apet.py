"""Train a random choice of tensors of any kind under a budget: the control that other adapters are to beat.

Su et al. 2023, arXiv:2306.02320 (APET), section 3, and the authors' code. Of the groups that could be added (both factors of a low-rank
update, both matrices of a bottleneck) such are taken in a random order as fit into half of the budget; of the base's own tensors (weights
and biases of the chosen layers), whole ones into the other half. To compare, give another adapter's count: LoRA on T5 base has 589,824.
What is saved are the drawn tensors alone, those of the base as what they gained.
Differs: a group counts with all its tensors, where the authors' code looks at the first, so that the budget holds. Every chosen layer
offers a group of each kind. Norms, embeddings and soft prompts are not drawn. Weight decay acts on what tensors of the base gained.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from modelwright.blocks._part import Part, Several
from modelwright.blocks.reparametrised import Reparametrised, Scatter, low_rank
from modelwright.core.errors import ModelError, SettingError
from modelwright.core.method import LayerAdapter
from modelwright.core.settings import count, number
from modelwright.methods.adapt.series import Series

ADDED, OWN = ("low-rank", "bottleneck"), ("weight", "bias")  # halves of the budget


@dataclass(frozen=True, kw_only=True)
class Apet(LayerAdapter):
    """Train what chance takes, as many numbers as another adapter has: does its design beat chance?"""

    status: ClassVar[str] = "checked"
    sized_by: ClassVar[tuple[str, ...]] = ("parameters",)
    suffices: ClassVar[frozenset[str]] = frozenset({"packed"})
    neutral = {}  # whatever is drawn starts at no change
    small = dict(parameters=200_000, inner=8)

    parameters: int = count(589_824)  # that train, at most
    kinds: tuple[str, ...] = (*ADDED, *OWN)  # that are drawn from: low-rank, bottleneck, weight, bias
    rank: int = count(8)  # of low-rank updates
    alpha: float = number(16.0, low=0)  # low-rank updates are scaled by alpha / rank
    inner: int = count(24)  # inner width of bottlenecks
    drawn: tuple[str, ...] | None = None  # kinds that train at one layer; by default they are drawn

    def problems(self) -> list[str]:
        known = (*ADDED, *OWN)
        wrong = [kind for kind in (*self.kinds, *(self.drawn or ())) if kind not in known]
        return [f"kinds and drawn are some of {', '.join(known)}; got {', '.join(wrong) or 'none'}."] * bool(wrong or not self.kinds)

    def divided(self, layers: Mapping[str, tuple[Self, tuple[int, ...], bool]]) -> Mapping[str, Mapping[str, Any]]:
        if len({method.parameters for method, _, _ in layers.values()}) > 1:
            raise SettingError(f"{self.name()}: parameters is one budget for all layers. Give one number.")
        free = {path: place for path, place in layers.items() if place[0].drawn is None}
        taken: dict[str, list[str]] = {path: [] for path in free}
        every = [(size, path, kind) for path, place in free.items() for kind, size in groups(*place).items()]
        for half in (ADDED, OWN):
            own, left = [group for group in every if group[2] in half], self.parameters // 2
            for place in torch.randperm(len(own), device="cpu").tolist():
                size, path, kind = own[place]
                if size <= left:
                    taken[path].append(kind)
                    left -= size
        if every and not any(taken.values()):
            least = f"the smallest of {len(every)} groups has {min(every)[0]:,}"
            raise ModelError(f"{self.name()}: half of {self.parameters:,} parameters holds nothing; {least}. Give more parameters.")
        return {path: {"drawn": tuple(kinds)} for path, kinds in taken.items()}

    def part(self, weight: Tensor, bias: Tensor | None) -> Several:
        (rows, columns), drawn = weight.shape, self.drawn or ()
        update = low_rank(rows, columns, self.rank, self.alpha / self.rank) if "low-rank" in drawn else None
        whole = Scatter((rows, columns), None, nn.Parameter(torch.zeros(rows * columns))) if "weight" in drawn else None
        shift = nn.Parameter(torch.zeros(rows)) if "bias" in drawn else None
        parts: list[Part] = [Reparametrised(update, scatter=whole, shift=shift)] if set(drawn) - {"bottleneck"} else []
        return Several([*parts, *([Series(inner=self.inner).part(weight, bias)] if "bottleneck" in drawn else ())])


def groups(method: Apet, shape: tuple[int, ...], biased: bool) -> dict[str, int]:
    """What may be drawn of a layer, with the numbers in it."""
    rows, columns = shape
    sizes = {"low-rank": method.rank * (rows + columns), "bottleneck": 2 * method.inner * min(rows, columns), "weight": rows * columns}
    return {kind: size for kind, size in (sizes | ({"bias": rows} if biased else {})).items() if kind in method.kinds}

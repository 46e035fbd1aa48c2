"""Merge low-rank adapters into one, by the changes that they make.

Forms on ΔW = Σ w_i s_i B_i A_i, with s_i = alpha/r (or alpha/√r): `cat` stacks the factors, which is exact at rank Σ r_i;
`svd` is the nearest product of `rank`; `ties` (arXiv:2306.01708) and `dare` (arXiv:2311.03099) merge the changes themselves
as task vectors and take the nearest product of the result. Source: huggingface/peft, add_weighted_adapter.
Differs: peft's svd forms multiply by s_i twice, and its ties and dare also work on A and B apart, which merges no changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from modelwright.core.adapters import Update, Whole, attach, read
from modelwright.core.errors import ModelError
from modelwright.core.method import ModelMethod
from modelwright.core.model import Model, unloaded, unwrapped
from modelwright.core.settings import count, fraction
from modelwright.maths.low_rank import change_factors, product_factors
from modelwright.maths.task_vectors import Sparsify, average, dropped, merge, trimmed
from modelwright.methods.merge._mechanism import Weighted, counted, rescaling


@dataclass(frozen=True, kw_only=True)
class Adapters(Weighted, ModelMethod):
    """Give the model one adapter that does what the donors' adapters of it do together; one of its own counts if it is a donor too."""

    status: ClassVar[str] = "checked"
    alike: ClassVar[bool] = True
    donors_want: ClassVar[frozenset[str]] = frozenset({"adapters"})
    leaves: ClassVar[frozenset[str]] = frozenset({"adapters"})
    fails = dict(bytes_are_as_predicted="ranks are those of the donors, which no plan has read")

    kind: Literal["cat", "svd", "ties", "dare"] = "cat"  # cat is exact; the others have at most `rank`
    rank: int | None = count(None)  # of a layer's update, at most; by default the sum of the donors'
    keep: float = fraction(0.5, low=1e-6)  # of each donor's changes, in ties and dare
    consensus: bool = False  # in dare: only changes that have the elected sign count, as they always do in ties

    def problems(self) -> list[str]:
        return ["kind: cat is exact at the sum of the ranks. Choose svd for a lower rank."] if self.kind == "cat" and self.rank else []

    @torch.no_grad()
    def model(self, model: Model, donors: Sequence[Model], rng: torch.Generator) -> Model:
        weights = self.weights_for(len(donors))
        found = [read(donor) for donor in donors]
        module = unloaded(model.module)
        same_places(module, donors, found)
        updates = {}
        for path in dict.fromkeys(path for each, _ in found for path in each):
            parts = [(weight, each[path]) for weight, (each, _) in zip(weights, found, strict=True) if path in each]
            biases = [weight * part.bias for weight, part in parts if part.bias is not None]
            updates[path] = replace(self.together(parts, rng), bias=torch.stack(biases).sum(0) if biases else None)
        whole: Whole = {}
        for path in dict.fromkeys(path for _, each in found for path in each):
            own = unwrapped(module).get_submodule(path).state_dict()
            those = [(weight, each[path]) for weight, (_, each) in zip(weights, found, strict=True) if path in each]
            rest, shares = 1 - sum(weight for weight, _ in those), [weight for weight, _ in those]
            whole[path] = {
                key: average([value, *(each[key] for _, each in those)], [rest, *shares], normalize=False).whole()
                for key, value in own.items()
            }
        model.module = attach(module, updates, whole)
        return model

    def together(self, parts: Sequence[tuple[float, Update]], rng: torch.Generator) -> Update:
        """One update for the weighted updates of one layer."""
        tall = torch.cat([weight * part.up for weight, part in parts], 1)
        wide = torch.cat([part.down for _, part in parts])
        highest = self.rank or wide.shape[0]
        if self.kind == "cat":
            return Update(tall, wide)
        if self.kind == "svd":
            return Update(*product_factors(tall, wide, highest))
        changes = [part.up @ part.down for _, part in parts]
        shares, ties = [weight for weight, _ in parts], self.kind == "ties"
        sparse = [counted(trimmed, keep=self.keep) if ties else self._dare(rng) for _ in changes]
        total = merge(torch.zeros_like(changes[0]), changes, shares, sparsify=sparse, consensus=ties or self.consensus, normalize=ties)
        return Update(*change_factors(total.whole(), highest)[:2])

    def _dare(self, rng: torch.Generator) -> Sparsify:
        seed = int(torch.randint(1 << 48, (), generator=rng))
        return rescaling(lambda values, _: dropped(values, self.keep, seed), self.keep, "inverse")


def same_places(module: torch.nn.Module, donors: Sequence[Model], found: Sequence[tuple[dict[str, Update], Whole]]) -> None:
    """Raise ModelError, naming every difference, unless all adapters fit the module and save the same layers whole."""
    shapes = {
        path: sorted(layer.weight.shape) for path, layer in module.named_modules() if isinstance(getattr(layer, "weight", None), Tensor)
    }
    whole = {path for _, each in found for path in each}
    faults = []
    for donor, (updates, saved) in zip(donors, found, strict=True):
        sizes = {path: sorted((len(one.up), one.down.shape[1])) for path, one in updates.items()}
        wrong = [path for path, size in sizes.items() if shapes.get(path) != size] + [path for path in saved if path not in shapes]
        if wrong:
            faults.append(f"{donor.name} adapts {len(wrong)} layers that the model has not, or in other shapes, first {wrong[0]}")
        if both := [path for path in updates if path in whole]:
            faults.append(f"{donor.name} has factors for {both[0]}, which another adapter saves whole")
    if faults:
        raise ModelError(f"Adapters can be merged when they belong to one model. {'; '.join(faults)}.")

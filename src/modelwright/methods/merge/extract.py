"""Turn a fine-tuned model into a low-rank adapter of its base.

Hu et al. 2021, arXiv:2106.09685, section 4.1, read backwards, as mergekit's extract_lora does: the truncated singular value
decomposition of W_donor - W_model, each layer at its own rank, the roots of the singular values in both factors.
Differs: what rounding alone explains has no rank; patterns of ranks name whole paths, where mergekit's names of one
word give layers of different blocks one rank; a bias goes into its layer's update only where all layers have one, since
peft cannot fold it otherwise. An embedding that is tied to the head is always saved whole, since peft adds factors twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import nn

from modelwright.core.adapters import Update, Whole, attach, nothing, takes_biases, tied_ends
from modelwright.core.gradients import floats
from modelwright.core.method import ModelMethod
from modelwright.core.model import Model, unwrapped
from modelwright.core.settings import count, fraction
from modelwright.core.together import same_tensors
from modelwright.maths.low_rank import change_factors, rounding


@dataclass(frozen=True, kw_only=True)
class Extract(ModelMethod):
    """Give the model an adapter of what the donor learned; what has no two sides is saved whole beside it."""

    status: ClassVar[str] = "checked"
    alike: ClassVar[bool] = True
    takes: ClassVar[tuple[int, int | None]] = (1, 1)
    leaves: ClassVar[frozenset[str]] = frozenset({"adapters"})
    fails = dict(bytes_are_as_predicted="ranks are those of the changes, which no plan has read")

    rank: int = count(128)  # of a layer's update, at most
    keep: float = fraction(1.0)  # of the square of a change: the least rank that holds it
    outside: Literal["whole", "factors"] = "whole"  # embeddings and head: saved whole, or as factors

    @torch.no_grad()
    def model(self, model: Model, donors: Sequence[Model], notes: list[str], details: list[str]) -> Model:
        same_tensors(model, donors)
        module, other = unwrapped(model.module), dict(unwrapped(donors[0].module).named_parameters())
        head, tied = getattr(module, "get_output_embeddings", lambda: None)(), tied_ends(module)
        updates: dict[str, Update] = {}
        biases: dict[str, torch.Tensor] = {}
        whole: set[str] = set()
        ranks: list[int] = []
        held: list[float] = []  # of each change's square, by the same layers
        for name, value in floats(module).items():
            path, _, leaf = name.rpartition(".")
            layer, change = module.get_submodule(path), other[name].float() - value.float()
            if torch.equal(other[name], value):
                continue
            kept = (layer is head or isinstance(layer, nn.Embedding)) and (self.outside == "whole" or bool(tied and path in tied))
            if kept or type(layer).__name__ not in ("Linear", "Conv1D", "Embedding"):
                whole.add(path)
            elif leaf == "bias":
                biases[path] = change
            else:
                change = change if isinstance(layer, nn.Linear) else change.T
                up, down, energy = change_factors(change, self.rank, self.keep, rounding(value))
                updates[path] = Update(up, down)
                details.append(f"{path}: rank {len(down)} of {min(change.shape)}, {energy:.4%} of the change's square")
                ranks.append(len(down))
                held.append(energy)
        if biases and takes_biases(module, [path for path, one in updates.items() if one.rank] + list(biases)):
            for path, bias in biases.items():
                found = updates.get(path)
                updates[path] = replace(found if found and found.rank else nothing(module.get_submodule(path)), bias=bias)
        else:
            whole |= set(biases)
        whole = {path for path in whole if not any(path.startswith(f"{outer}.") for outer in whole)}
        updates = {path: one for path, one in updates.items() if not any(f"{path}.".startswith(f"{outer}.") for outer in whole)}
        if ranks:
            notes.append(
                f"{self.name()}: {len(ranks)} layers have ranks from {min(ranks)} to {max(ranks)}, with {min(held):.4%} to {max(held):.4%} "
                "of the squares of their changes; the record says which"
            )
        if not updates and not whole:
            notes.append(f"{self.name()}: {donors[0].name} does not differ from {model.name}, so the adapter adds nothing")
        if whole:
            notes.append(f"{self.name()}: saved whole: {', '.join(sorted(whole))}")
        saved: Whole = {
            path: {key: value.detach() for key, value in unwrapped(donors[0].module).get_submodule(path).state_dict().items()}
            for path in whole
        }
        model.module = attach(module, updates, saved)
        return model

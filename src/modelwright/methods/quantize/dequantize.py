"""Make weights that are stored in few bits dense again, each the number that its code stands for.

Folklore. The model is then as large as before it was quantised, and later steps can change it; what rounding has lost stays lost.
Differs: nothing. Layers whose inputs are rounded as they come do that no longer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from modelwright.anatomy import removal
from modelwright.blocks._stored import Stored
from modelwright.blocks.experts import fuse_experts
from modelwright.core.errors import ModelError
from modelwright.core.loading import PACKED, described
from modelwright.core.method import ModelMethod
from modelwright.core.model import GUESTS, Model, plain_module, unwrapped


@dataclass(frozen=True, kw_only=True)
class Dequantize(ModelMethod):
    """Put dense weights in the place of packed ones, so that other methods can work on them; needs no text."""

    status: ClassVar[str] = "checked"
    wants: ClassVar[frozenset[str]] = frozenset({"packed"})
    leaves: ClassVar[frozenset[str]] = frozenset({"float"})
    drops: ClassVar[frozenset[str]] = frozenset({"packed"})

    def model(self, model: Model) -> Model:
        self.refuse_guests(model.module)
        _dense(unwrapped(model.module))
        return model

    def planned(self, module: Any, donors: int) -> Any:
        self.refuse_guests(module)
        _dense(module)
        return module

    def refuse_guests(self, module: nn.Module) -> None:
        """Raise ModelError where other parts than packed weights keep later steps away."""
        if found := [name for name, text in described(module).items() if text["kind"] in GUESTS]:
            raise ModelError(f"{self.name()}: {found[0]} stands for work that no step may change afterwards. Use the model as it is.")


def _dense(module: nn.Module) -> None:
    """Replace every layer that stores codes by a dense one; places that share codes share the weight."""
    packed = {path: layer for path, layer in module.named_modules() if isinstance(layer, Stored) and layer.kind in PACKED}
    config: Any = getattr(module, "config", None)
    plain = dict(plain_module(config).named_modules()) if config is not None else {}
    made: dict[int, nn.Parameter] = {}
    for path, layer in packed.items():
        weight = made.setdefault(id(next(layer.buffers())), nn.Parameter(layer.dense()))
        old: Any = plain.get(path.removesuffix(".base_layer"))  # of what an adapter stands beside
        transposed = layer.replaces == "Conv1D"
        if old is None:  # one of an expert that was split, or of two factors
            old = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
        with removal.resizing(old):
            old.weight = nn.Parameter(weight.T.contiguous()) if transposed else weight
            if hasattr(layer, "bias"):
                old.bias = layer.bias
        for name, value in old.named_buffers():  # what an embedding is multiplied by
            old.register_buffer(name, torch.tensor(layer.multiplier, dtype=value.dtype), persistent=False)
        module.set_submodule(path, old.train(layer.training))
    fuse_experts(module)

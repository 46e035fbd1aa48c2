"""Store the codes of layers that were trained with rounded weights, and no longer the weights that they rounded.

The last step of `quantize.bitlinear` and `quantize.fairy2i`, of no paper of its own. Outputs stay as they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from modelwright.blocks._trained import Trained
from modelwright.core import sharing
from modelwright.core.errors import LayoutError
from modelwright.core.method import ModelMethod
from modelwright.core.model import Model, unwrapped


@dataclass(frozen=True, kw_only=True)
class Pack(ModelMethod):
    """Store what layers of `quantize.bitlinear` and `quantize.fairy2i` compute with, once training is over."""

    status: ClassVar[str] = "checked"
    wants: ClassVar[frozenset[str]] = frozenset({"rounding"})
    leaves: ClassVar[frozenset[str]] = frozenset({"packed"})
    drops: ClassVar[frozenset[str]] = frozenset({"float", "rounding"})

    def model(self, model: Model) -> Model:
        self.planned(unwrapped(model.module), 0)
        return model

    @torch.no_grad()
    def planned(self, module: Any, donors: int) -> Any:
        places: dict[int, list[tuple[str, Trained]]] = {}
        for path, layer in module.named_modules(remove_duplicate=False):
            if isinstance(layer, Trained) and not layer.packed:
                places.setdefault(id(layer.weight_master), []).append((path, layer))
        if not places:
            raise LayoutError(f"{self.name()} chooses no weight: no layer rounds its weights. Take it after `quantize.bitlinear`.")
        for same in places.values():
            for (path, old), layer in zip(same, sharing.copies(same[0][1].pack(), len(same)), strict=True):
                layer.take_bias(old.bias)
                module.set_submodule(path, layer)
        return module

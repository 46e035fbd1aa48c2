"""Put trained adapters into the weights.

Hu et al. 2021, arXiv:2106.09685, section 4.1 (no added latency); peft's `merge_and_unload`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from modelwright.core.method import ModelMethod
from modelwright.core.model import Model


@dataclass(frozen=True, kw_only=True)
class Fold(ModelMethod):
    """Add the adapters' updates to the weights they stand beside, and take the adapters away."""

    status: ClassVar[str] = "checked"
    wants: ClassVar[frozenset[str]] = frozenset({"adapters"})
    drops: ClassVar[frozenset[str]] = frozenset({"adapters", "sparse"})  # an update fills zeros in

    def model(self, model: Model) -> Model:
        bearer: Any = model.module
        model.module = bearer.merge_and_unload(safe_merge=True)
        return model

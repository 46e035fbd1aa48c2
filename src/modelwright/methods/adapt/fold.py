"""Put trained adapters into the weights.

Hu et al. 2021, arXiv:2106.09685, section 4.1 (no added latency); peft's `merge_and_unload`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from modelwright.core.adapters import folded
from modelwright.core.errors import PlanError
from modelwright.core.method import ModelMethod
from modelwright.core.model import Model
from modelwright.core.sharing import shared


@dataclass(frozen=True, kw_only=True)
class Fold(ModelMethod):
    """Add the adapters' updates to the weights they stand beside, and take the adapters away."""

    status: ClassVar[str] = "checked"
    wants: ClassVar[frozenset[str]] = frozenset({"adapters", "float"})
    drops: ClassVar[frozenset[str]] = frozenset({"adapters", "sparse"})  # an update fills zeros in

    def model(self, model: Model, notes: list[str]) -> Model:
        bearer: Any = model.module
        self.refuse_shared(bearer)
        model.module, why_not = folded(bearer)
        if why_not:
            notes.append(f"{self.name()}: {why_not}, so that this loads after `import modelwright` alone")
        return model

    def planned(self, module: Any, donors: int) -> Any:
        self.refuse_shared(module)
        return folded(module)[0]

    def refuse_shared(self, bearer: Any) -> None:
        """Raise PlanError where blocks share weights, each with an adapter of its own beside them."""
        if ties := shared(bearer):
            alias, name = next(iter(ties.items()))
            raise PlanError(
                f"{self.name()}: the same tensor stands at {name} and at {alias}, with an adapter for each place, and so at "
                f"{len(ties)} places. Save the model with its adapters, or share with store: dense before they are attached."
            )

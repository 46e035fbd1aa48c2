"""Take heads out of a model with an adapter, where weight and update of queries and values are small: DSEE, structured.

Chen, Chen, Chen, Awadallah, Wang, Cheng 2021, arXiv:2111.00160, section 3.3, and the authors' code. Over the rows of a head the
sizes of the update of queries and values (s B A of `adapt.lora`, s (B A + S) of `adapt.dsee`) are summed (`update`), with those of W
(`both`), or those of W alone (`weight`). The heads with the least of each block go, and the update's rows and columns with them, those of
S too. Put `train` behind it.
Differs: query heads go with their key-value head. Neurons, which the paper finds by gates with an l1 penalty, are left to other methods,
before the adapter is attached. The base is stored beside the adapter, as it is no longer the one named.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from modelwright.anatomy import Site, Units, anatomy_of
from modelwright.anatomy._base import output_dim
from modelwright.core.adapters import Update, plain_layers, read, without_units
from modelwright.core.errors import SiteError
from modelwright.core.model import Model, unwrapped
from modelwright.core.settings import fraction
from modelwright.methods.prune._units import Kept, UnitPruner, per_member, take_out

SCORED = ("attn.q", "attn.v")


@dataclass(frozen=True, kw_only=True)
class DseeHeads(UnitPruner):
    """Take the smallest heads out of a model with an adapter, weights and updates both; needs no text."""

    status: ClassVar[str] = "checked"
    wants: ClassVar[frozenset[str]] = frozenset({"float", "adapters"})
    neutral = dict(share=0.0)
    changes_base: ClassVar[bool] = True
    kinds: ClassVar[tuple[str, ...]] = ("heads",)

    units: tuple[str, ...] = ("heads",)  # kinds that go: heads
    share: float = fraction(0.25)  # of the heads of each block that go
    scope: Literal["block"] = "block"  # each block loses the same share
    measure: Literal["both", "update", "weight"] = "both"  # whose sizes are summed

    def model(self, model: Model, notes: list[str]) -> Model:
        updates, _ = read(model, sparse=True)
        with plain_layers(unwrapped(model.module)) as bearers:
            return self.pruned(model, (updates, bearers), notes)

    def look(self, model: Model, found: Sequence[Units], source: Any) -> Any:
        return source

    def scores(self, module: nn.Module, found: Sequence[Units], seen: Any) -> list[Tensor]:
        updates, _ = seen
        sites = {site.name: site for site in anatomy_of(module).sites(module) if site.role in (*SCORED, "attn.qkv")}
        scored = {name: self.sizes(module, site, updates.get(site.module)) for name, site in sites.items()}
        if self.measure != "weight" and not any(site.module in updates for site in sites.values()):
            raise SiteError(f"{self.name()}: the adapter updates no queries and no values. Score the weights: measure: weight.")
        found = [replace(units, spans=tuple(span for span in units.spans if span.name in scored)) for units in found]
        return [torch.stack([part.sum((1, 2)) for part in per_member(units, scored)]).sum(0) for units in found]

    def sizes(self, module: nn.Module, site: Site, update: Update | None) -> Tensor:
        """The sizes of a matrix's entries that count, laid out as the matrix; keys among fused rows count nothing."""
        weight = module.get_parameter(site.name).float()
        found = torch.zeros_like(weight) if self.measure == "update" else weight.abs()
        if update is not None and self.measure != "weight":
            change = update.change().abs()
            found = found + (change.T if site.transposed else change)
        for part in site.parts:
            if part.role not in SCORED:
                found.narrow(output_dim(site), part.start, part.stop - part.start).zero_()
        return found

    def compensate(self, module: nn.Module, found: Sequence[Units], kept: Kept, seen: Any) -> str:
        without_units(seen[1], found, kept)
        return ""

    def planned(self, module: Any, donors: int) -> Any:
        base = unwrapped(module)
        with plain_layers(base) as bearers:
            found = self.found(base)
            kept = self.kept(base, found, [torch.arange(units.count) for units in found])
            without_units(bearers, found, kept)
            take_out(base, found, kept)
        return module

"""Zero weights under an adapter where weight and update together are small, then tune the update on: the pruning side of DSEE.

Chen, Chen, Chen, Awadallah, Wang, Cheng 2021, arXiv:2111.00160, section 3.3 and algorithm 1. Beside W stands an update ΔW: s B A of
`adapt.lora`, s (B A + S) of `adapt.dsee`. Of the matrices that bear one the score is |W + ΔW| (`both`, their WABS), |ΔW| (`update`, ABS)
or |W| (`weight`, W); of the others it is |W|. Without `sparse`, S does not count (WAB and AB). The lowest go, by one threshold over all
matrices with an update and one over all others. Only W is masked: the layer then computes (mask ⊙ W + ΔW) x. Put `train` behind it, which
moves the update alone.
Differs: the update counts with its scale; the authors' code scales S alone. The base is stored beside the adapter, as it is no longer the
one named. Folded, the weights are not sparse: the update fills zeros in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor

from modelwright.anatomy import Site
from modelwright.core.adapters import bearing, read
from modelwright.core.model import Model, unwrapped, weight_of
from modelwright.core.settings import fraction
from modelwright.methods.prune._mechanism import ModelPruner


@dataclass(frozen=True, kw_only=True)
class Dsee(ModelPruner):
    """Zero `sparsity` of the frozen weights of a model with an adapter, by what the update makes of them; needs no text."""

    status: ClassVar[str] = "checked"
    wants: ClassVar[frozenset[str]] = frozenset({"float", "adapters"})
    neutral = dict(sparsity=0.0)

    measure: Literal["both", "update", "weight"] = "both"  # what of a matrix with an update is small: their sum, the update, the weight
    sparse: bool = True  # entries that an update has beside its product count too
    adapted: float | None = fraction(None)  # sparsity of the matrices with an update; by default as of the others
    store: Literal["dense"] = "dense"  # peft puts adapters on dense layers alone

    def problems(self) -> list[str]:
        alone = self.scope == "tensor" or bool(self.pattern) or not isinstance(self.adapted, float)
        apart = self.adapted is not None and alone
        return super().problems() + ["adapted is one share of weights that compete over the model. Use scope: model, no pattern."] * apart

    def model(self, model: Model, notes: list[str]) -> Model:
        model = self.pruned(model, (), notes)
        notes.append(f"{self.name()}: the zeros are in the weights beside the adapter; adapt.fold fills them in")
        return model

    def scores(self, model: Model, sites: Sequence[Site], calibration: Sequence[Any], notes: list[str]) -> list[Tensor]:
        updates, _ = read(model, sparse=True)
        found = []
        for site in sites:
            weight = weight_of(unwrapped(model.module), site)
            assert weight is not None, site
            score = weight.detach().float()
            update = updates.get(bearing(site))
            if update is not None and self.measure != "weight":
                change = update.change(self.sparse)
                score = change if self.measure == "update" else score + change
            found.append(score.abs())
        return found

    def leagues(self, sites: Sequence[Site]) -> list[tuple[float, list[int]]]:
        numbers = {own: [number for number, site in enumerate(sites) if bool(bearing(site)) is own] for own in (True, False)}
        shares = {True: self.sparsity if self.adapted is None else self.adapted, False: self.sparsity}
        return [(shares[own], numbers[own]) for own in (True, False) if numbers[own]]

    def promise(self) -> dict[str, Any]:
        return super().promise() if self.adapted in (None, self.sparsity) else {}

"""Remove the neurons and heads whose outputs vary least, and put what they gave on average into biases: FLAP.

An, Zhao, Yu, Tang, Wang 2024, arXiv:2312.11983, sections 3.2 to 3.4. Of input j of the last matrix of an attention or MLP, the score is
its variance times Σᵢ Wᵢⱼ² (`fluctuation`, their WIFV), which is the squared error that is left once its mean is in the bias; or
its variance alone (`variance`, IFV); or its norm times the mean of |Wᵢⱼ| (`size`, WIFN). Scores of attentions are squared. Over
the whole model (`scope: model`, their AL-AM) the scores of each layer are standardised and units count by their
parameters; a head's score is the mean of its channels'. Without `bias` and with `size` it is Wanda-sp.
Differs: variances are those over all tokens, without the aliasing of the authors' code. A unit is a key-value head with
its query heads. A unit that would go beyond the share is passed over.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from modelwright.anatomy import Site
from modelwright.anatomy._base import Units, output_dim
from modelwright.anatomy.removal import give_biases
from modelwright.core.given import Batch
from modelwright.core.model import Model, weight_of
from modelwright.core.passage import statistics_of
from modelwright.core.statistics import Statistics
from modelwright.maths.allocation import standardised
from modelwright.methods.prune._units import Kept, TextUnitPruner, inputs_of_units, last_matrix

Seen = list[tuple[Site, Statistics]]  # of each entry, the matrix through which its units write, and that one's inputs


@dataclass(frozen=True, kw_only=True)
class Flap(TextUnitPruner):
    """Take out the heads and neurons that a constant can stand for best, and let biases be that constant; no training."""

    status: ClassVar[str] = "checked"
    neutral = dict(share=0.0)

    scope: Literal["block", "model"] = "model"  # each block loses the same share; or units of all blocks compete
    measure: Literal["fluctuation", "variance", "size"] = "fluctuation"  # of an input of the matrix that units write through
    bias: bool = True  # add what leaves gave on average to the bias

    def problems(self) -> list[str]:
        wrong = sorted(set(self.units) & set(self.kinds) - {"mlp", "heads"})
        return super().problems() + ([f"units are mlp and heads, which write through one matrix; got {', '.join(wrong)}."] if wrong else [])

    def look(self, model: Model, found: Sequence[Units], calibration: Sequence[Batch]) -> Seen:
        sites = [last_matrix(model.module, units) for units in found]
        statistics = statistics_of(model, sites, ("variance", "norm"), calibration)
        return [(site, statistics[site.name]) for site in sites]

    def scores(self, module: nn.Module, found: Sequence[Units], seen: Seen) -> list[Tensor]:
        scores = []
        for units, (site, statistics) in zip(found, seen, strict=True):
            weight = weight_of(module, site)
            assert weight is not None, site
            channels = inputs_of_units(units, self.channels(weight.float(), statistics))
            channels = channels.square() if units.kind == "heads" else channels
            scores.append((standardised(channels) if self.scope == "model" else channels).mean(1))
        return scores

    def channels(self, weight: Tensor, statistics: Statistics) -> Tensor:
        """The measure of each input [in] of a matrix [out, in]."""
        if self.measure == "size":
            return weight.abs().mean(0) * statistics.norm
        return statistics.variance * (weight.square().sum(0) if self.measure == "fluctuation" else 1.0)

    def compensate(self, module: nn.Module, found: Sequence[Units], kept: Kept, seen: Seen) -> str:
        if not self.bias:
            return ""
        biases = {}
        for units, rows, (site, statistics) in zip(found, kept, seen, strict=True):
            weight, gone = weight_of(module, site), torch.ones(units.count, dtype=torch.bool)
            assert weight is not None, site
            gone[rows] = False
            mean = inputs_of_units(units, statistics.mean.clone())
            biases[site.module] = weight.float() @ (mean * gone.to(mean.device)[:, None]).view(-1)
        return give_biases(module, biases) if any(bias.any() for bias in biases.values()) else ""

    def planned(self, module: Any, donors: int) -> Any:
        module = super().planned(module, donors)
        if self.bias and self.share:
            sites = [last_matrix(module, units) for units in self.found(module)]
            rows = {site.module: module.get_submodule(site.module).weight.shape[output_dim(site)] for site in sites}
            give_biases(module, {path: torch.empty(size, device="meta") for path, size in rows.items()})
        return module

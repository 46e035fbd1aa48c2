"""Round column by column, and let the columns still to come make up for the error.

Frantar, Ashkboos, Hoefler, Alistarh 2022, arXiv:2210.17323, algorithm 1.
Differs: group scales are those of the original weights, also when columns are taken by falling importance ("static"
order), so that checkpoints need no column index. A group that does not divide a row is lowered to the largest
divisor that they share, or raised to the whole row where that is below 16. Weights that are 0 stay 0 on grids with a 0, as in
SparseGPT's joint form, so that what a pruned model has lost stays lost. The damping is raised tenfold when the factorisation fails.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from modelwright.core.method import LayerMethod
from modelwright.core.settings import count, number
from modelwright.core.statistics import Statistics
from modelwright.maths import second_order
from modelwright.methods.quantize._mechanism import Quantizer


@dataclass(frozen=True, kw_only=True)
class Gptq(Quantizer, LayerMethod):
    """Store weights in a few bits, as integers or on another grid, chosen so that the layers' outputs on the text change least."""

    status: ClassVar[str] = "checked"
    gathers: ClassVar[tuple[str, ...]] = ("moment",)
    solves: ClassVar[bool] = True
    small = dict(group=32)

    order: bool = False  # columns with large inputs first; costs nothing at inference
    damp: float = number(0.01, low=0)  # added to the moment's diagonal, as a share of its mean
    columns: int = count(128, unit="columns")  # between updates of all later columns

    def layer(self, weight: Tensor, statistics: Statistics) -> nn.Module:
        grid = self.fitted(weight)
        places = None
        if self.order:
            moment = statistics.moment
            places = moment.diagonal().argsort(descending=True, stable=True)
            inverse, dead, _ = second_order.inverse_factor(moment[places[:, None], places], self.damp)
            del moment
        else:
            inverse, dead, _ = statistics.inverse_factor(self.damp)
        ordered = weight if places is None else weight[:, places]
        pick = second_order.rounded(grid, places)
        if self.holds_zeros() and not weight.all():
            pick = second_order.masked(ordered != 0, pick)
        values, _ = second_order.sweep(ordered, inverse, pick, dead=dead, block=self.columns, dtype=torch.float32)
        del inverse
        if places is not None:
            values = values[:, places.argsort()]
        return self.stored(grid, grid.encode(values), weight)

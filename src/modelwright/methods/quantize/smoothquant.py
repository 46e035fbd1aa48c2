"""Move what is hard to round from inputs into weights, and round both to 8 bits: SmoothQuant.

Xiao, Lin, Seznec, Wu, Demouth, Han 2022, arXiv:2211.10438, equation 4: s_j = max|x_j|^a / max|w_j|^(1-a); the norm before is divided by s
and the matrices multiplied. Weights then have a scale for each row, and inputs one for each token, found as they come.
Differs: a token's scale is max|x| / ((2^bits - 1) / 2), as compressed-tensors has it, so that plain transformers computes the same.
Channels that the text leaves at 0 keep s = 1. Inputs of o and down, which no norm makes, are rounded as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from modelwright.core.method import LayerMethod
from modelwright.core.settings import fraction
from modelwright.core.statistics import Statistics
from modelwright.methods.quantize._mechanism import Both

LEAST = 1e-5  # of a scale


@dataclass(frozen=True, kw_only=True)
class SmoothQuant(Both, LayerMethod):
    """Round weights and inputs to 8 bits, after taking turns in which of them is hard to round; needs little text."""

    status: ClassVar[str] = "checked"
    gathers: ClassVar[tuple[str, ...]] = ("largest",)
    fails = {"only_chosen_sites_change": "what makes the inputs of a chosen matrix is divided by what they are multiplied by"}

    migration: float = fraction(0.5)  # how much of the inputs' range moves into the weights

    def rescales(self) -> bool:
        return True

    def rescale(
        self, kind: str, readers: Sequence[tuple[SmoothQuant, Tensor]], statistics: Statistics, harm: Callable[[Sequence[Tensor]], float]
    ) -> Tensor | None:
        if kind != "norm":
            return None
        inputs = statistics.largest
        columns = torch.stack([weight.float().abs().amax(0) for _, weight in readers]).amax(0).clamp(min=LEAST)
        return torch.where(inputs > 0, (inputs**self.migration / columns ** (1 - self.migration)).clamp(min=LEAST), 1.0)

    def layer(self, weight: Tensor, statistics: Statistics) -> nn.Module:
        return self.packed(weight)

"""Round inputs by one step for all channels after a LayerNorm has taken over what they differ in: RepQ-ViT, for linear layers.

Li, Xiao, Yang, Gu 2022, arXiv:2212.08254, on LayerNorm: each channel's own scale s and zero point z become those of the layer, by γ / r1,
(β + s r2) / r1, W diag(r1) and b - W (s r2), r1 being s over the layer's scale and r2 = z less its zero point. That changes no output, so
that inputs of q, k, v and up lose what they would lose with a scale and a zero point for each channel. Weights have a scale for each row.
Differs: ranges are from the least to the greatest input, times one of 1, 0.95, ..., 0.5 with the least error of the outputs, in the place
of percentiles. The middle of a range is a point of the grid, which has 2^b - 1 of them; the layer's scale is 1 and its zero point 0. Inputs
that no norm with a bias makes are scaled as in `quantize.mergequant`; those of other matrices have one step and one middle. Weights
are rounded to nearest. Attention's probabilities, which the paper rounds on a grid of powers of √2, stay in floats, as do q, k and v.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from modelwright.blocks.static import StaticLinear
from modelwright.core.settings import count
from modelwright.core.statistics import Statistics
from modelwright.methods.quantize._mechanism import Stepped


@dataclass(frozen=True, kw_only=True)
class RepqVit(Stepped):
    """Round weights and inputs of models with LayerNorms, such as ViT, by fixed steps around each channel's middle; needs a few inputs."""

    status: ClassVar[str] = "checked"
    gathers: ClassVar[tuple[str, ...]] = ("range", "sample")

    bits: int = count(6, 2, 8, "bits")  # per weight
    inputs: int = count(6, 2, 16, "bits")  # per input

    def recentre(self, statistics: Statistics) -> Tensor:
        least, most = statistics.range
        return (least + most) / 2

    def sizes(self, statistics: Statistics) -> Tensor:
        least, most = statistics.range
        return torch.maximum(-least, most)

    def together(self, statistics: Statistics) -> tuple[Tensor | None, Tensor]:
        least, most = statistics.range[0].min().view(1), statistics.range[1].max().view(1)
        return (least + most) / 2, (most - least) / 2

    def planned(self, weight: Tensor) -> nn.Module:
        return StaticLinear(*weight.shape, bits=self.bits, inputs=self.inputs, shifted=True, dtype=weight.dtype, device="meta")

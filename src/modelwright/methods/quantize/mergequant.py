"""Round inputs by steps for each channel that are merged into what makes them and into the weights: MergeQuant.

Wang et al. 2025, arXiv:2503.07654: s_j = c · max|x_j| / (2^(b-1) - 1); the norm's weights are divided by s, so that its outputs are whole
numbers once rounded, and the matrices multiplied by s before they are rounded row by row. Columns far out are cut in several that read
the same input, in the places of the least important (mean x² · ‖w‖²).
Differs: no code was found; what the paper leaves open is ours. Far out are columns by their largest merged weight, and they are cut where
the error on the text gets smaller by it. c is one of 1, 0.95, ..., 0.5 for all channels of a norm, with the least error of the rounded
outputs. Inputs that nothing before can be divided for have one step for the matrix; those of o and down are merged into v and up where
`quantize.awq` scales them. Errors are of at most 1,024 tokens. No low-rank compensation; no token stays in floats.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from modelwright.blocks.static import StaticLinear
from modelwright.core.settings import number
from modelwright.maths.static_inputs import reconstruction
from modelwright.methods.quantize._mechanism import Stepped


@dataclass(frozen=True, kw_only=True)
class MergeQuant(Stepped):
    """Round weights and inputs to few bits with nothing computed of the inputs at run time; needs text that shows their ranges."""

    status: ClassVar[str] = "checked"
    gathers: ClassVar[tuple[str, ...]] = ("largest", "sample")
    fails = Stepped.fails | {
        "bytes_are_as_predicted": "which input a column reads is planned for every matrix, and stored where there are columns far out",
    }

    deviations: float = number(3.0, low=0)  # from which a column's size counts as far out, above the mean

    def columns(self, merged: Tensor, inputs: Tensor) -> list[tuple[Tensor, Tensor] | None]:
        sizes = merged.float().abs().amax(0)
        read, share = reconstruction(sizes, inputs.square().mean(0) * merged.float().square().sum(0), self.deviations)
        return [None, (read, share)] if (share < 1).any() else [None]

    def planned(self, weight: Tensor) -> nn.Module:
        return StaticLinear(*weight.shape, bits=self.bits, inputs=self.inputs, gathered=True, dtype=weight.dtype, device="meta")

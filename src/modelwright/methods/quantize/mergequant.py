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

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from modelwright.blocks.static import StaticLinear
from modelwright.core.method import LayerMethod
from modelwright.core.settings import count, number
from modelwright.core.statistics import Statistics
from modelwright.maths import grids
from modelwright.maths.static_inputs import CLIPS, reconstruction, rounded, steps
from modelwright.methods.quantize._mechanism import Packer


@dataclass(frozen=True, kw_only=True)
class MergeQuant(Packer, LayerMethod):
    """Round weights and inputs to few bits with nothing computed of the inputs at run time; needs text that shows their ranges."""

    status: ClassVar[str] = "checked"
    gathers: ClassVar[tuple[str, ...]] = ("largest", "sample")
    fails = {
        "only_chosen_sites_change": "what makes the inputs of a chosen matrix is divided by what they are multiplied by",
        "bytes_are_as_predicted": "which input a column reads is planned for every matrix, and stored where there are columns far out",
    }

    bits: int = count(4, 2, 8, "bits")  # per weight
    inputs: int = count(4, 2, 16, "bits")  # per input
    deviations: float = number(3.0, low=0)  # from which a column's size counts as far out, above the mean

    def rescales(self) -> bool:
        return True

    def rescale(
        self, kind: str, readers: Sequence[tuple[MergeQuant, Tensor]], statistics: Statistics, harm: Callable[[Sequence[Tensor]], float]
    ) -> Tensor | None:
        tried = [steps(statistics.largest, clip, self.inputs) for clip in CLIPS]
        return min(tried, key=lambda step: sum(own.best(weight.float() * step, statistics.sample / step)[0] for own, weight in readers))

    def layer(self, weight: Tensor, statistics: Statistics) -> nn.Module:
        tried: list[Tensor | None] = [None]
        if not statistics.rescaled:
            tried = [steps(statistics.largest.max().view(1), clip, self.inputs) for clip in CLIPS]
        found = []
        for step in tried:
            merged, inputs = (weight, statistics.sample) if step is None else (weight.float() * step, statistics.sample / step)
            found.append((*self.best(merged.to(weight.dtype), inputs), step))
        _, grid, codes, index, step = min(found, key=lambda one: one[0])
        return StaticLinear.of(codes, grid.scale, bits=self.bits, inputs=self.inputs, step=step, index=index)

    def best(self, merged: Tensor, inputs: Tensor) -> tuple[float, grids.Affine, Tensor, Tensor | None]:
        """The error on inputs in steps [tokens, in] of a matrix for them, its grid, codes and the inputs that its columns read."""
        exact, numbers = inputs @ merged.float().T, rounded(inputs, self.inputs)
        sizes = merged.float().abs().amax(0)
        read, share = reconstruction(sizes, inputs.square().mean(0) * merged.float().square().sum(0), self.deviations)
        found = []
        for index in [None, read] if (share < 1).any() else [None]:
            columns = merged if index is None else (merged[:, index].float() * share).to(merged.dtype)
            grid = grids.affine(columns, self.bits, None, even=True)
            codes = grid.encode(columns)
            given = numbers if index is None else numbers[:, index]
            found.append((float((given @ grid.decode(codes).float().T - exact).square().sum()), grid, codes, index))
        return min(found, key=lambda one: one[0])

    def planned(self, weight: Tensor) -> nn.Module:
        return StaticLinear(*weight.shape, bits=self.bits, inputs=self.inputs, gathered=True, dtype=weight.dtype, device="meta")

    def promise(self) -> dict[str, float]:
        return {"bits": self.bits} if isinstance(self.bits, int) else {}

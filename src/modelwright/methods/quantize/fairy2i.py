"""Read a matrix as two complex ones and round these to 1, -1, i and -i, term upon term, to be trained: Fairy2i.

Wang et al. 2025, arXiv:2512.02901, sections 3.1 to 3.4: y = U z + W z̄ with z = x[:m] + i x[m:]; the axis whose part is larger, a scale
mean|part| for each axis; again on what is left over, `terms` times, as many bits for each weight. Gradients go straight to the weights.
Differs: matrices with an odd number of rows or columns are refused by name, not left out in silence. Scales have no floor of 1e-6.
`by_row` is ours. Without training it is no better than residual signs, which it is turned by 45 degrees; its gain is from training.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from modelwright.blocks.phases import PhaseLinear
from modelwright.core.method import TensorMethod
from modelwright.core.settings import count
from modelwright.methods.quantize._mechanism import Trainable


@dataclass(frozen=True, kw_only=True)
class Fairy2i(Trainable, TensorMethod):
    """Round weights to sums of complex phases, 1 bit each for a term, while the model trains; then pack with `quantize.pack`."""

    status: ClassVar[str] = "checked"
    drops: ClassVar[frozenset[str]] = Trainable.drops | {"sparse"}  # no phase is 0

    terms: int = count(2)  # each of which rounds what those before leave over; bits for each weight
    by_row: bool = False  # scales for each row, and not for the whole matrix

    def unfit(self, shape: tuple[int, ...]) -> str:
        if len(shape) == 2 and (shape[0] % 2 or shape[1] % 2):
            return f"has the shape {list(shape)}, and complex numbers take even numbers of rows and columns"
        return super().unfit(shape)

    def form(self) -> dict[str, Any]:
        """The settings of the layer."""
        return {"terms": self.terms, "by_row": self.by_row}

    def tensor(self, weight: Tensor) -> nn.Module:
        return PhaseLinear.from_weight(weight, **self.form())

    def planned(self, weight: Tensor) -> nn.Module:
        return PhaseLinear(*weight.shape, **self.form(), dtype=weight.dtype, device="meta")

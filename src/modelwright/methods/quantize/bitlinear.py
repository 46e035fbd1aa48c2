"""Make linears of ternary weights and 8-bit inputs, to be trained: BitLinear.

Zhu et al. 2024, arXiv:2406.02528, section 3.1, as the authors' code has it: RMSNorm inside the layer, a scale max|x| / 127 for each
token, weights -1, 0 and 1 times mean|w| of the matrix, gradients straight through both roundings. Made again for the gradient is
whatever the layer can make again (the fused form). `quantize.pack` stores the codes, five in a byte, once training is over.
Differs: biases stay. The norm adds 1e-6, as the fused call does; ranges of inputs have no floor of 1e-5. A pretrained model computes
something else until it has been trained; the norm's gain begins at 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from modelwright.blocks.ternary import TernaryLinear
from modelwright.core.method import TensorMethod
from modelwright.methods.quantize._mechanism import Trainable


@dataclass(frozen=True, kw_only=True)
class BitLinear(Trainable, TensorMethod):
    """Round weights to -1, 0 and 1 and inputs to 8 bits while the model trains; follow with `distill.recover` or `train`, then pack."""

    status: ClassVar[str] = "checked"

    def tensor(self, weight: Tensor) -> nn.Module:
        return TernaryLinear.from_weight(weight)

    def planned(self, weight: Tensor) -> nn.Module:
        return TernaryLinear(*weight.shape, dtype=weight.dtype, device="meta")

"""Round weights and inputs to 8 bits, and leave the few columns in which an input is large: LLM.int8().

Dettmers, Lewis, Belkada, Zettlemoyer 2022, arXiv:2208.07339, sections 3.1 and 3.2, as bitsandbytes does it: a scale for each row of
the weights and one for each token's inputs below `threshold`; columns in which an input reaches it are multiplied in full precision
with the rounded weights.
Differs: scales are in the weights' dtype, where bitsandbytes has float32. With threshold 0 a token's scale is max|x| / 127.5, as
compressed-tensors has it, so that plain transformers computes the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from modelwright.core.method import TensorMethod
from modelwright.core.settings import number
from modelwright.methods.quantize._mechanism import Both


@dataclass(frozen=True, kw_only=True)
class LlmInt8(Both, TensorMethod):
    """Round weights and inputs to 8 bits but for columns of large inputs; needs no text."""

    status: ClassVar[str] = "checked"

    threshold: float = number(6.0, low=0)  # from which size on an input is not rounded, nor its column; 0 rounds all

    def form(self) -> dict[str, Any]:
        return super().form() | {"threshold": self.threshold}

    def tensor(self, weight: Tensor) -> nn.Module:
        return self.packed(weight)

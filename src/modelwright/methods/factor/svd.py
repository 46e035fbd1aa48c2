"""Keep the largest singular values of every matrix.

Eckart, Young 1936, The approximation of one matrix by another of lower rank, Psychometrika 1(3).
Differs: the singular values are shared evenly between the factors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from modelwright.core.method import TensorMethod
from modelwright.methods.factor._mechanism import Factoriser


@dataclass(frozen=True, kw_only=True)
class Svd(Factoriser, TensorMethod):
    """Replace matrices by two factors that fit the weights best; needs no text."""

    status: ClassVar[str] = "checked"
    neutral = dict(keep=1.0)

    def tensor(self, weight: Tensor) -> Tensor | nn.Module:
        return self.factored(weight, None)

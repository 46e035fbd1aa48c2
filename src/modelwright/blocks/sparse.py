"""A linear layer that stores only the weights that are not zero."""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor, nn

from modelwright.blocks._stored import Stored, parameter
from modelwright.maths.bits import packed, unpacked


class SparseLinear(Stored):
    """y = x Wᵀ + b, where one bit says of each weight whether it is stored.

    Stored: weight_mask uint8 [out, ceil(in / 8)], column 8k + j in bit j of byte k; weight_values [nonzeros], row after
    row; bias [out]. With values of v bits it is smaller than dense once more than 1/v of the weights are 0. W is made
    anew at each call; the values can be trained, and zeros stay zero.
    """

    kind = "sparse"
    weight_mask: Tensor
    bias: nn.Parameter | None

    def __init__(
        self,
        out_features: int,
        in_features: int,
        *,
        nonzeros: int,
        bias: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ):
        super().__init__()
        self.out_features, self.in_features = out_features, in_features
        mask = torch.empty(out_features, -(-in_features // 8), dtype=torch.uint8, device=device)
        self.register_buffer("weight_mask", mask)
        self.weight_values = nn.Parameter(torch.empty(nonzeros, dtype=dtype, device=device))
        self.bias = parameter(torch.empty(out_features, dtype=dtype, device=device) if bias else None)

    @classmethod
    def from_dense(cls, weight: Tensor, bias: Tensor | None = None) -> Self:
        """Store the nonzero entries of weight [out, in]."""
        out, columns = weight.shape
        kept = weight.detach() != 0
        layer = cls(out_features=out, in_features=columns, nonzeros=0, dtype=weight.dtype, device=weight.device)
        layer.weight_mask = packed(kept)
        layer.weight_values = nn.Parameter(weight.detach()[kept])
        layer.bias = parameter(bias)
        return layer

    def mask(self) -> Tensor:
        """True where a weight is stored, bool [out, in]."""
        return unpacked(self.weight_mask, self.in_features)

    def dense(self) -> Tensor:
        """W [out, in]."""
        zeros = self.weight_values.new_zeros(self.out_features, self.in_features)
        return zeros.masked_scatter(self.mask(), self.weight_values)

    def forward(self, inputs: Tensor) -> Tensor:
        """inputs [..., in] → [..., out]."""
        return nn.functional.linear(inputs, self.dense(), self.bias)

    def settings(self) -> dict[str, Any]:
        """What makes such a layer beside its sizes, as a JSON object."""
        return {"nonzeros": self.weight_values.numel()}

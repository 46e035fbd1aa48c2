"""A linear layer of odd whole numbers in planes of signs, of which the first ones are the layer in fewer bits."""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor, nn

from modelwright.blocks._stored import Stored, parameter
from modelwright.maths import bit_planes


class PlanesLinear(Stored):
    """y = x Ŵᵀ + b with Ŵ = scale · Σ 2^i (2 b_i - 1), a bit b_i of each weight in a plane of its own.

    Stored: weight_planes uint8 [bits, out, ceil(in / 8)], the highest plane first; weight_scale [out, groups]; bias [out].
    group: columns that share a scale, a divisor of in_features; None is the whole row. No weight is 0. Ŵ is made anew at each call.
    """

    kind = "planes"
    weight_planes: Tensor
    weight_scale: Tensor
    bias: nn.Parameter | None

    def __init__(
        self,
        out_features: int,
        in_features: int,
        *,
        bits: int,
        group: int | None = None,
        bias: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ):
        super().__init__()
        self.out_features, self.in_features, self.bits, self.group = out_features, in_features, bits, group
        self.register_buffer("weight_planes", torch.empty(bits, out_features, -(-in_features // 8), dtype=torch.uint8, device=device))
        self.register_buffer("weight_scale", torch.empty(out_features, in_features // (group or in_features), dtype=dtype, device=device))
        self.bias = parameter(torch.empty(out_features, dtype=dtype, device=device) if bias else None)

    @classmethod
    def from_codes(cls, codes: Tensor, scale: Tensor, bits: int, bias: Tensor | None = None) -> Self:
        """Store codes uint8 [out, in] of the numbers 2 · code - (2^bits - 1), with a scale [out, groups]."""
        return cls._of(bit_planes.planes(codes, bits), scale, codes.shape[1], bias)

    @classmethod
    def _of(cls, planes: Tensor, scale: Tensor, columns: int, bias: Tensor | None) -> Self:
        group = None if scale.shape[1] == 1 else columns // scale.shape[1]
        layer = cls(scale.shape[0], columns, bits=len(planes), group=group, dtype=scale.dtype, device="meta")
        layer.weight_planes, layer.weight_scale, layer.bias = planes, scale.detach().clone(), parameter(bias)
        return layer

    def first(self, bits: int) -> Self:
        """The layer of the first planes alone, 1 to as many as there are: each scale is twice as large for every plane that goes."""
        assert 1 <= bits <= self.bits, bits
        return type(self)._of(self.weight_planes[:bits].clone(), self.weight_scale * 2 ** (self.bits - bits), self.in_features, self.bias)

    def dense(self) -> Tensor:
        """Ŵ [out, in] in the scales' dtype."""
        numbers = bit_planes.numbers(self.weight_planes, self.in_features).to(self.weight_scale.dtype)
        return numbers.view(*self.weight_scale.shape, -1).mul_(self.weight_scale.unsqueeze(-1)).view(len(numbers), -1)

    def forward(self, inputs: Tensor) -> Tensor:
        """inputs [..., in] → [..., out], in the inputs' dtype."""
        return self.linear(inputs)

    def settings(self) -> dict[str, Any]:
        """What makes such a layer beside its sizes, as a JSON object."""
        return {"bits": self.bits, "group": self.group}

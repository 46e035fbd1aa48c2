"""A linear layer of ternary weights that norms its inputs and rounds them to 8 bits: BitLinear."""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor, nn

from modelwright.blocks._stored import parameter
from modelwright.blocks._trained import Trained
from modelwright.maths import ternary


class TernaryLinear(Trained):
    """y = Q(norm(x)) Ŵᵀ + b, Ŵ = code · scale with codes -1, 0 and 1, Q to 8 bits with a scale for each token.

    Stored: norm [in], the gain of the RMSNorm; bias [out]; weight_master [out, in], or packed weight_packed uint8 [out, ceil(in / 5)],
    five codes in a byte, and weight_scale float32 [1].
    """

    kind = "ternary"
    weight_packed: Tensor | None
    weight_scale: Tensor | None
    bias: nn.Parameter | None

    def __init__(
        self,
        out_features: int,
        in_features: int,
        *,
        packed: bool = False,
        bias: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ):
        super().__init__()
        self.out_features, self.in_features, self.packed = out_features, in_features, packed
        self.exact, self.rounds_inputs = ("weight_scale",), packed
        codes = torch.empty(out_features, -(-in_features // ternary.DIGITS), dtype=torch.uint8, device=device)
        self.register_buffer("weight_packed", codes if packed else None)
        self.register_buffer("weight_scale", torch.empty(1, dtype=torch.float32, device=device) if packed else None)
        self.weight_master = None if packed else parameter(torch.empty(out_features, in_features, dtype=dtype, device=device))
        self.norm = nn.Parameter(torch.ones(in_features, dtype=dtype, device=device))
        self.bias = parameter(torch.empty(out_features, dtype=dtype, device=device) if bias else None)

    def pack(self) -> Self:
        codes, scale = self.codes()
        layer = type(self)(self.out_features, self.in_features, packed=True, dtype=self.norm.dtype, device=self.norm.device)
        layer.weight_packed, layer.weight_scale = ternary.pack(codes), scale
        layer.norm, layer.bias, layer.replaces = self.norm, self.bias, self.replaces
        return layer

    def codes(self) -> tuple[Tensor, Tensor]:
        """The codes int8 [out, in] and their scale [1]."""
        if self.weight_packed is None or self.weight_scale is None:
            assert self.weight_master is not None
            return ternary.ternary(self.weight_master)
        return ternary.unpack(self.weight_packed, self.in_features), self.weight_scale

    def dense(self) -> Tensor:
        """Ŵ [out, in] in the layer's dtype; what it is multiplied by are normed and rounded inputs."""
        codes, scale = self.codes()
        return (codes * scale).to(self.norm.dtype)

    def forward(self, inputs: Tensor) -> Tensor:
        """inputs [..., in] → [..., out], in the inputs' dtype."""
        if self.weight_master is None:
            found = ternary.product(inputs, self.norm, *self.codes())
        else:
            found = ternary.trained_product(inputs, self.norm, self.weight_master)
        return (found if self.bias is None else found + self.bias).to(inputs.dtype)

    def settings(self) -> dict[str, Any]:
        """What makes such a layer beside its sizes, as a JSON object."""
        return {"packed": self.packed}

"""A linear layer of 8-bit floats, stored as compressed-tensors stores one (format float-quantized)."""

from __future__ import annotations

from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from modelwright.blocks._stored import Stored, parameter
from modelwright.maths.grids import TILE, Float8


class Float8Linear(Stored):
    """y = x Ŵᵀ + b with Ŵ = float · scale.

    Stored: weight float8_e4m3fn [out, in]; weight_scale [out, 1] for each row, [1] for the matrix, or [⌈out / 128⌉, in / 128] for
    each tile; bias [out]. `weight` of the module is Ŵ, made anew at each call.
    """

    kind = "float8"
    exact = ("weight",)
    weight_scale: Tensor
    bias: nn.Parameter | None

    def __init__(
        self,
        out_features: int,
        in_features: int,
        *,
        scope: Literal["row", "tensor", "tile"] = "row",
        bias: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ):
        super().__init__()
        self.out_features, self.in_features, self.scope = out_features, in_features, scope
        shape = {"row": (out_features, 1), "tensor": (1,), "tile": (-(-out_features // TILE), in_features // TILE)}[scope]
        self._buffers["weight"] = torch.empty(out_features, in_features, dtype=torch.float8_e4m3fn, device=device)
        self.register_buffer("weight_scale", torch.empty(shape, dtype=dtype, device=device))
        self.bias = parameter(torch.empty(out_features, dtype=dtype, device=device) if bias else None)

    @classmethod
    def from_codes(cls, codes: Tensor, grid: Float8, scope: Literal["row", "tensor", "tile"], bias: Tensor | None = None) -> Self:
        """Store the codes [out, in] of a grid whose scales are of this scope."""
        layer = cls(*codes.shape, scope=scope, dtype=grid.stored.dtype, device="meta")
        layer._buffers["weight"] = codes
        layer.weight_scale = grid.stored.detach().clone()
        layer.bias = parameter(bias)
        return layer

    def dense(self) -> Tensor:
        """Ŵ [out, in] in the scales' dtype."""
        codes = self._buffers["weight"]
        assert codes is not None
        return Float8(self.weight_scale, self.out_features).decode(codes).to(self.weight_scale.dtype)

    def forward(self, inputs: Tensor) -> Tensor:
        """inputs [..., in] → [..., out], in the inputs' dtype."""
        return self.linear(inputs)

    def scheme(self) -> dict[str, Any] | None:
        strategy = {"row": "channel", "tensor": "tensor", "tile": "block"}[self.scope]
        weights = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": False, "strategy": strategy}
        return {"format": "float-quantized", "weights": weights | ({"block_structure": [TILE, TILE]} if self.scope == "tile" else {})}

    def settings(self) -> dict[str, Any]:
        """What makes such a layer beside its sizes, as a JSON object."""
        return {"scope": self.scope}

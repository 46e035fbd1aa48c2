"""A linear layer whose weights are levels of a table, scaled by group."""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor, nn

from modelwright.blocks._stored import Stored, parameter
from modelwright.maths import levels as tables
from modelwright.maths.grids import Scaled
from modelwright.maths.packed_products import product
from modelwright.maths.rounding import pack_bytes, unpack_bytes
from modelwright.maths.scales import empty, read

LEARNED = "k-means"  # a table of the layer's own


class LevelsLinear(Stored):
    """y = x Ŵᵀ + b with Ŵ = level[code] · scale, the codes in a dense stream of 1 to 8 bits each.

    Stored: weight_packed uint8 [out, ceil(in · bits / 8)]; the scales of `group` columns each, in a form of `maths.scales`; bias
    [out]; with levels "k-means" weight_levels float32 [2^bits]. Ŵ is made anew for many inputs, in the layer's
    dtype; a few are multiplied by what the codes say (`maths.packed_products`).
    """

    kind = "levels"
    weight_packed: Tensor
    weight_levels: Tensor | None
    bias: nn.Parameter | None

    def __init__(
        self,
        out_features: int,
        in_features: int,
        *,
        levels: str,
        bits: int,
        group: int | None = None,
        scales: str = "own",
        bias: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ):
        super().__init__()
        self.out_features, self.in_features, self.bits, self.group = out_features, in_features, bits, group
        self.levels, self.scales = levels, scales
        self.dtype = dtype or torch.get_default_dtype()
        self.register_buffer("weight_packed", torch.empty(out_features, -(-in_features * bits // 8), dtype=torch.uint8, device=device))
        stored = empty(scales, out_features, in_features // (group or in_features), dtype, device)
        self.exact = ("weight_levels", *(stored if scales != "own" else ()))
        for name, value in stored.items():
            self.register_buffer(name, value)
        self.register_buffer("weight_levels", torch.empty(2**bits, device=device) if levels == LEARNED else None)
        self.bias = parameter(torch.empty(out_features, dtype=dtype, device=device) if bias else None)

    @classmethod
    def from_codes(cls, codes: Tensor, grid: Scaled, levels: str, dtype: torch.dtype, bias: Tensor | None = None) -> Self:
        """Store the codes uint8 [out, in] of a grid whose table has this name."""
        rows, columns = codes.shape
        group = None if grid.groups == 1 else columns // grid.groups
        layer = cls(rows, columns, levels=levels, bits=grid.table.bits, group=group, scales=grid.form, dtype=dtype, device=codes.device)
        layer.weight_packed = pack_bytes(codes, layer.bits)
        for name, value in grid.stored.items():
            setattr(layer, name, value.detach().clone())
        if levels == LEARNED:
            layer.weight_levels = grid.table.values.to(codes.device)
        layer.bias = parameter(bias)
        return layer

    def _apply(self, function: Any, recurse: bool = True) -> Self:
        self.dtype = function(torch.empty(0, dtype=self.dtype)).dtype
        return super()._apply(function, recurse)

    def values(self) -> Tensor:
        """The levels by their codes, float32 [2^bits]."""
        own = self.weight_levels
        return tables.named(self.levels, self.bits).values.to(self.weight_packed.device) if own is None else own

    def codes(self) -> Tensor:
        """The codes, uint8 [out, in]."""
        return unpack_bytes(self.weight_packed, self.bits, self.in_features)

    def scale(self) -> Tensor:
        """The scales, float32 [out, groups]."""
        return read({name: value for name, value in self._buffers.items() if value is not None}, self.scales)

    def dense(self) -> Tensor:
        """Ŵ [out, in]: the products are rounded once, to the layer's dtype."""
        scale, values = self.scale(), self.values()
        if 8 % self.bits == 0:  # all levels of a byte at once
            places = torch.arange(256, device=values.device)[:, None] >> torch.arange(0, 8, self.bits, device=values.device)
            found = values[places & (2**self.bits - 1)][self.weight_packed.int()].flatten(1)[:, : self.in_features]
        else:
            found = values[self.codes().int()]
        return found.reshape(self.out_features, scale.shape[1], -1).mul_(scale[..., None]).view(self.out_features, -1).to(self.dtype)

    def forward(self, inputs: Tensor) -> Tensor:
        """inputs [..., in] → [..., out], in the inputs' dtype."""
        found = product(inputs, self.weight_packed, self.bits, self.scale(), table=self.values()) if self.bits == 4 else None
        if found is None:
            return self.linear(inputs)
        return found if self.bias is None else found + self.bias

    def scheme(self) -> dict[str, Any] | None:
        known = {("e2m1", 16, "e4m3"): ("nvfp4", "tensor_group", "float8_e4m3fn"), ("e2m1", 32, "e8m0"): ("mxfp4", "group", "uint8")}
        if (found := known.get((self.levels, self.group or 0, self.scales))) is None:
            return None
        name, strategy, kind = found
        weights = {"num_bits": 4, "type": "float", "symmetric": True, "dynamic": False, "strategy": strategy, "group_size": self.group}
        return {"format": f"{name}-pack-quantized", "weights": weights | {"scale_dtype": f"torch.{kind}", "zp_dtype": f"torch.{kind}"}}

    def settings(self) -> dict[str, Any]:
        """What makes such a layer beside its sizes, as a JSON object."""
        return {"levels": self.levels, "bits": self.bits, "group": self.group, "scales": self.scales}

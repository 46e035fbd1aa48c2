"""A linear layer of packed integers whose inputs are rounded by steps that are known beforehand."""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor, nn

from modelwright.blocks._stored import Stored
from modelwright.blocks.packed import PackedLinear
from modelwright.maths.rounding import pack
from modelwright.maths.static_inputs import rounded


class StaticLinear(PackedLinear):
    """y = scale · (code · q) + b with q = clip(round(x)) of `inputs` bits: nothing is computed of the inputs but this.

    Stored: what `PackedLinear` stores; not `merged`, input_step float32 [1], by which the inputs are divided first: else what makes them
    gives them in steps; `shifted`, input_shift float32 [1], what is taken from the inputs before that, and comes back as its product with
    the weights; `gathered`, weight_index int32 [in], the input that each column reads. in_features of the codes is that of the inputs.
    """

    kind = "static"
    input_step: Tensor | None
    input_shift: Tensor | None
    weight_index: Tensor | None
    inputs: int

    def __init__(
        self,
        out_features: int,
        in_features: int,
        *,
        bits: int,
        inputs: int,
        merged: bool = False,
        gathered: bool = False,
        shifted: bool = False,
        bias: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ):
        super().__init__(out_features, in_features, bits=bits, inputs=inputs, bias=bias, dtype=dtype, device=device)
        assert not (shifted and (merged or gathered)), "what makes the inputs can take a shift, or which they are is not known"
        self.exact = ("input_step", "input_shift")
        self.register_buffer("input_step", None if merged else torch.empty(1, dtype=torch.float32, device=device))
        self.register_buffer("input_shift", torch.empty(1, dtype=torch.float32, device=device) if shifted else None)
        self.register_buffer("weight_index", torch.empty(in_features, dtype=torch.int32, device=device) if gathered else None)

    @classmethod
    def of(
        cls, codes: Tensor, scale: Tensor, *, bits: int, inputs: int, step: Tensor | None, index: Tensor | None = None,
        shift: Tensor | None = None,
    ) -> Self:  # fmt: skip
        """Store codes int8 [out, in] and their scale [out, 1], the inputs' step and shift [1] and the input that each column reads [in]."""
        sizes = dict(merged=step is None, gathered=index is not None, shifted=shift is not None)
        layer = cls(*codes.shape, bits=bits, inputs=inputs, **sizes, dtype=scale.dtype, device=codes.device)
        layer.weight_packed, layer.weight_scale = pack(codes, bits), scale.detach().clone()
        layer.input_step, layer.input_shift, layer.weight_index = step, shift, None if index is None else index.to(torch.int32)
        return layer

    def dense(self) -> Tensor:
        """Ŵ [out, in], of inputs as they come, not rounded."""
        found = super().dense()
        if self.weight_index is not None:
            found = torch.zeros_like(found).index_add_(1, self.weight_index, found)
        return found if self.input_step is None else (found / self.input_step).to(found.dtype)

    def forward(self, inputs: Tensor) -> Tensor:
        """inputs [..., in] → [..., out], in the inputs' dtype."""
        given = inputs if self.input_shift is None else inputs.float() - self.input_shift
        numbers = rounded(given if self.input_step is None else given.float() / self.input_step, self.inputs)
        numbers = numbers if self.weight_index is None else numbers[..., self.weight_index]
        found = nn.functional.linear(numbers, codes := self.codes().float())
        if self.input_shift is not None and self.input_step is not None:
            found = found + self.input_shift / self.input_step * codes.sum(1)
        found = found * self.weight_scale.float().T
        return (found if self.bias is None else found + self.bias).to(inputs.dtype)

    def scheme(self) -> None:
        return None

    why_not = Stored.why_not
    standing_for = Stored.standing_for

    def settings(self) -> dict[str, Any]:
        """What makes such a layer beside its sizes, as a JSON object."""
        return {
            "bits": self.bits,
            "inputs": self.inputs,
            "merged": self.input_step is None,
            "gathered": self.weight_index is not None,
        } | ({"shifted": True} if self.input_shift is not None else {})

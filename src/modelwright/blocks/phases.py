"""A linear layer whose weight is a pair of complex matrices of phases, as a sum of terms."""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor, nn

from modelwright.blocks._stored import parameter
from modelwright.blocks._trained import Trained
from modelwright.maths import phases, residual, rounding
from modelwright.maths.phases import Phases

BITS = 2  # of a code


class PhaseLinear(Trained):
    """y = x Ŵᵀ + b, Ŵ the real matrix of U and W [out / 2, in / 2], each a sum of `terms` matrices of phases times scales.

    Stored: weight_master [out, in]; or packed weight_packed uint8 [terms, out, ceil(in / 8)], the codes of the rows of U and then of W,
    four in a byte, and weight_scale float32 [terms, 2, 2, out / 2 or 1], of U and W, of both axes, `by_row` for each row; bias [out].
    The first terms alone are the layer with so many. Ŵ is made anew at each call.
    """

    kind = "phases"
    weight_packed: Tensor | None
    weight_scale: Tensor | None
    bias: nn.Parameter | None

    def __init__(
        self,
        out_features: int,
        in_features: int,
        *,
        terms: int,
        by_row: bool = False,
        packed: bool = False,
        bias: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ):
        super().__init__()
        self.out_features, self.in_features, self.terms, self.by_row, self.packed = out_features, in_features, terms, by_row, packed
        self.dtype = dtype or torch.get_default_dtype()
        self.exact = ("weight_scale",)
        codes = torch.empty(terms, out_features, -(-in_features // 8), dtype=torch.uint8, device=device)
        scale = torch.empty(terms, 2, 2, out_features // 2 if by_row else 1, dtype=torch.float32, device=device)
        self.register_buffer("weight_packed", codes if packed else None)
        self.register_buffer("weight_scale", scale if packed else None)
        self.weight_master = None if packed else parameter(torch.empty(out_features, in_features, dtype=dtype, device=device))
        self.bias = parameter(torch.empty(out_features, dtype=dtype, device=device) if bias else None)

    def _apply(self, function: Any, recurse: bool = True) -> Self:
        self.dtype = function(torch.empty(0, dtype=self.dtype)).dtype
        return super()._apply(function, recurse)

    def pack(self) -> Self:
        assert self.weight_master is not None
        return self._holding(self.stack())

    def first(self, terms: int) -> Self:
        """The packed layer of the first terms alone, of a packed layer."""
        return self._holding(self.stack()[:terms])

    def _holding(self, stack: list[Phases]) -> Self:
        settings: dict[str, Any] = dict(terms=len(stack), by_row=self.by_row, packed=True)
        layer = type(self)(self.out_features, self.in_features, **settings, dtype=self.dtype, device="meta")
        rows = torch.cat([term.codes.flatten(0, 1) for term in stack])
        layer.weight_packed = rounding.pack_bytes(rows, BITS).view(len(stack), self.out_features, -1)
        layer.weight_scale = torch.stack([term.scale for term in stack])
        layer.bias, layer.replaces = self.bias, self.replaces
        return layer

    def stack(self) -> list[Phases]:
        """The terms, of codes [2, out / 2, in / 2]: those that are stored, or those of the weight that is trained."""
        if self.weight_packed is None or self.weight_scale is None:
            assert self.weight_master is not None
            fitted = phases.paired(self.weight_master.detach())
            return residual.stack(fitted, self.terms, lambda rest: phases.fit(rest, self.by_row), phases.decode)
        codes = rounding.unpack_bytes(self.weight_packed.flatten(0, 1), BITS, self.in_features // 2)
        shape = (self.terms, 2, self.out_features // 2, -1)
        return [Phases(*term) for term in zip(codes.view(shape), self.weight_scale, strict=True)]

    def dense(self) -> Tensor:
        """Ŵ [out, in] in the layer's dtype."""
        return phases.unpaired(residual.total(self.stack(), phases.decode)).to(self.dtype)

    def forward(self, inputs: Tensor) -> Tensor:
        """inputs [..., in] → [..., out], in the inputs' dtype; the gradient of Ŵ goes to the trained weight as it is."""
        weight = self.dense() if self.weight_master is None else rounding.straight_through(self.weight_master, self.dense())
        return nn.functional.linear(inputs, weight.to(inputs.dtype), self.bias)

    def settings(self) -> dict[str, Any]:
        """What makes such a layer beside its sizes, as a JSON object."""
        return {"terms": self.terms, "by_row": self.by_row, "packed": self.packed}

"""A linear layer of terms, each signs times two thin factors, of which any number of first ones can be in memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from modelwright.blocks._stored import Stored, parameter
from modelwright.maths import residual, signed_low_rank
from modelwright.maths.signed_low_rank import Signed

PARTS = tuple(f"weight_{part}" for part in Signed._fields)


class BitStackLinear(Stored):
    """y = x Ŵᵀ + b with Ŵ = Σ_t S_t ⊙ (A_t B_t), as many terms as are in memory, the first at least.

    Stored for each term t from 0 on: weight_signs_t uint8 [ceil(out · in / 8)], row after row, 1 for plus, the first in the highest bit;
    weight_left_t float16 [out, rank], A; weight_right_t float16 [rank, in], B; bias [out]. places: of each term after the first, where it
    stands in the one order of all layers' further terms. Ŵ is made anew at each call.
    """

    kind = "bit_stack"
    bias: nn.Parameter | None

    def __init__(
        self,
        out_features: int,
        in_features: int,
        *,
        rank: int,
        places: Sequence[int] = (),
        bias: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ):
        super().__init__()
        self.out_features, self.in_features, self.rank = out_features, in_features, rank
        self.dtype = dtype or torch.get_default_dtype()
        self.places: list[int] = []
        for place in (None, *places):
            self.add(self.empty(device), place)
        self.bias = parameter(torch.empty(out_features, dtype=dtype, device=device) if bias else None)

    @classmethod
    def of(cls, terms: Sequence[Signed], places: Sequence[int], dtype: torch.dtype, bias: Tensor | None = None) -> Self:
        """Store terms, one more than there are places."""
        (rows, rank), columns = terms[0].left.shape, terms[0].right.shape[1]
        layer = cls(rows, columns, rank=rank, dtype=dtype, device="meta")
        layer.keep(0)
        for term, place in zip(terms, (None, *places), strict=True):
            layer.add(term, place)
        layer.bias = parameter(bias)
        return layer

    def empty(self, device: torch.device | str | None = None) -> Signed:
        """A term without values."""
        signs = torch.empty(-(-self.weights() // 8), dtype=torch.uint8, device=device)
        left, right = (torch.empty(shape, dtype=torch.float16, device=device)
                       for shape in ((self.out_features, self.rank), (self.rank, self.in_features)))  # fmt: skip
        return Signed(signs, left, right)

    @property
    def terms(self) -> int:
        """How many are in memory."""
        return sum(name.startswith(PARTS[0]) for name in self._buffers)

    def add(self, term: Signed, place: int | None = None) -> None:
        """Have one more term in memory; its place, where it is not the first."""
        number = self.terms
        self.places += [] if place is None else [place]
        for part, value in zip(PARTS, term, strict=True):
            self.register_buffer(f"{part}_{number}", value)
        self.exact = tuple(name for name in self._buffers if name.startswith("weight_"))

    def keep(self, terms: int) -> None:
        """Have no more than the first of these terms in memory."""
        for number in range(terms, self.terms):
            for part in PARTS:
                del self._buffers[f"{part}_{number}"]
        self.places = self.places[: max(terms - 1, 0)]
        self.exact = tuple(name for name in self._buffers if name.startswith("weight_"))

    def stack(self) -> list[Signed]:
        """The terms that are in memory."""
        return [Signed(*(self.get_buffer(f"{part}_{number}") for part in PARTS)) for number in range(self.terms)]

    def _apply(self, function: Any, recurse: bool = True) -> Self:
        self.dtype = function(torch.empty(0, dtype=self.dtype)).dtype
        return super()._apply(function, recurse)

    def dense(self) -> Tensor:
        """Ŵ [out, in], summed in float32, in the layer's dtype."""
        return residual.total(self.stack(), signed_low_rank.decode).to(self.dtype)

    def forward(self, inputs: Tensor) -> Tensor:
        """inputs [..., in] → [..., out], in the inputs' dtype."""
        return self.linear(inputs)

    def settings(self) -> dict[str, Any]:
        """What makes such a layer beside its sizes, as a JSON object; the places say how many terms there are."""
        return {"rank": self.rank, "places": list(self.places)}

"""A linear layer of two thin factors."""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor, nn

from modelwright.blocks._stored import Stored, parameter


class LowRankLinear(Stored):
    """y = B (A x) + b. Stored: a.weight [rank, in], b.weight [out, rank], b.bias [out]; all can be trained.

    The factors are layers themselves, so that each can be quantised in its turn.
    """

    kind = "low_rank"
    stands_for_dense = False

    def __init__(
        self,
        out_features: int,
        in_features: int,
        *,
        rank: int,
        bias: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ):
        super().__init__()
        self.out_features, self.in_features, self.rank = out_features, in_features, rank
        with torch.device("meta"):
            self.a = nn.Linear(in_features, rank, bias=False, dtype=dtype)
            self.b = nn.Linear(rank, out_features, bias=bias, dtype=dtype)
        if torch.device(device or "cpu").type != "meta":
            self.to_empty(device=device or "cpu")

    @classmethod
    def from_factors(cls, weight_b: Tensor, weight_a: Tensor, bias: Tensor | None = None) -> Self:
        """Store B [out, rank] and A [rank, in]."""
        layer = cls(out_features=weight_b.shape[0], in_features=weight_a.shape[1], rank=weight_a.shape[0], device="meta")
        layer.a.weight, layer.b.weight = nn.Parameter(weight_a.detach()), nn.Parameter(weight_b.detach())
        layer.take_bias(parameter(bias))
        return layer

    @property
    def bias(self) -> nn.Parameter | None:  # type: ignore[override]
        """The bias [out], which stands in the second factor."""
        return self.b.bias

    def take_bias(self, bias: nn.Parameter | None) -> None:
        """Go on with this bias [out]."""
        self.b.bias = bias  # type: ignore[assignment]

    def dense(self) -> Tensor:
        """B A [out, in]."""
        b, a = (part.dense() if isinstance(part, Stored) else part.weight for part in (self.b, self.a))
        return b @ a

    def forward(self, inputs: Tensor) -> Tensor:
        """inputs [..., in] → [..., out]."""
        return self.b(self.a(inputs))

    def settings(self) -> dict[str, Any]:
        """What makes such a layer beside its sizes, as a JSON object."""
        return {"rank": self.rank}

"""A linear layer whose weight is stored without loss, its exponents as a prefix code."""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor, nn

from modelwright.blocks._coded import CodedWeight
from modelwright.blocks._stored import Stored, parameter
from modelwright.maths import coded_floats


class CodedLinear(CodedWeight):
    """y = x Wᵀ + b, where W [out, in] is decoded at each call, bit by bit what it was. Stored: as `CodedWeight`; bias [out].

    transposed: the entries are stored column after column, as a Conv1D has them, and y is computed as one does.
    """

    kind = "coded"
    bias: nn.Parameter | None

    def __init__(
        self,
        out_features: int,
        in_features: int,
        *,
        nbytes: int,
        stored: str,
        transposed: bool = False,
        bias: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ):
        super().__init__()
        self.out_features, self.in_features, self.transposed = out_features, in_features, transposed
        self.hold_empty(nbytes, stored, device)
        self.bias = parameter(torch.empty(out_features, dtype=dtype, device=device) if bias else None)

    @classmethod
    def from_dense(cls, weight: Tensor, bias: Tensor | None = None) -> Self:
        """Code weight [out, in] of a dtype in `maths.coded_floats.SPLITS`; one that lies transposed in memory stays so."""
        layer = cls.empty(weight, nbytes=0)
        parts = coded_floats.encode(weight.T if layer.transposed else weight)
        layer.hold(parts)
        layer.to(weight.device)
        layer.bias = parameter(bias)
        return layer

    @classmethod
    def empty(cls, weight: Tensor, nbytes: int) -> Self:
        """The layer for weight [out, in], without values, its codes of so many bytes."""
        transposed = not weight.is_contiguous() and weight.T.is_contiguous()
        return cls(*weight.shape, nbytes=nbytes, stored=str(weight.dtype).removeprefix("torch."), transposed=transposed, device="meta")

    def dense(self) -> Tensor:
        """W [out, in]."""
        return self.values().view(self.in_features, -1).T if self.transposed else self.values().view(self.out_features, -1)

    def forward(self, inputs: Tensor) -> Tensor:
        """inputs [..., in] → [..., out], in the inputs' dtype; the bits are those of the layer that stood here."""
        return self.linear(inputs)

    def product(self, inputs: Tensor, bias: Tensor | None) -> Tensor:
        if not self.transposed or bias is None:
            return super().product(inputs, bias)
        found = torch.addmm(bias, inputs.reshape(-1, self.in_features), self.dense().to(inputs.dtype).T)
        return found.view(*inputs.shape[:-1], self.out_features)

    def why_not(self, old: nn.Module) -> str:
        return "" if isinstance(old, nn.Embedding) else super().why_not(old)

    def standing_for(self, old: nn.Module) -> Stored:
        """The layer itself, or an embedding of its values."""
        if not isinstance(old, nn.Embedding):
            return super().standing_for(old)
        from modelwright.blocks.coded_embedding import CodedEmbedding

        return CodedEmbedding.from_linear(self, multiplier=float(getattr(old, "embed_scale", 1.0))).standing_for(old)

    def settings(self) -> dict[str, Any]:
        """What makes such a layer beside its sizes, as a JSON object."""
        return {"transposed": self.transposed, **self.describe_parts()}

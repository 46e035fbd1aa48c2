"""A linear layer stored as two block-diagonal matrices around a sparse core."""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor, nn

from modelwright.blocks._stored import Stored, parameter
from modelwright.blocks.sparse import SparseLinear


class ArmorLinear(Stored):
    """y = A (C (B x)) + b: A and B block-diagonal with square blocks, C sparse.

    Stored: left [out / size, size, size] and right [in / size, size, size], the blocks of A and of B; core.weight_mask and
    core.weight_values, C as in `SparseLinear`; bias [out]. All values can be trained, and zeros of C stay zero.
    """

    kind = "armor"
    stands_for_dense = False
    bias: nn.Parameter | None

    def __init__(
        self,
        out_features: int,
        in_features: int,
        *,
        size: int,
        nonzeros: int,
        bias: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ):
        super().__init__()
        self.out_features, self.in_features, self.size = out_features, in_features, size
        self.left = nn.Parameter(torch.empty(out_features // size, size, size, dtype=dtype, device=device))
        self.right = nn.Parameter(torch.empty(in_features // size, size, size, dtype=dtype, device=device))
        self.core = SparseLinear(out_features, in_features, nonzeros=nonzeros, dtype=dtype, device=device)
        self.bias = parameter(torch.empty(out_features, dtype=dtype, device=device) if bias else None)

    @classmethod
    def from_parts(cls, left: Tensor, core: Tensor, right: Tensor, bias: Tensor | None = None) -> Self:
        """Store the blocks of A [out / size, size, size] and of B [in / size, size, size], and C [out, in]."""
        layer = cls(*core.shape, size=left.shape[1], nonzeros=0, dtype=core.dtype, device=core.device)
        layer.left, layer.right = nn.Parameter(left.detach()), nn.Parameter(right.detach())
        layer.core, layer.bias = SparseLinear.from_dense(core), parameter(bias)
        return layer

    def dense(self) -> Tensor:
        """A C B [out, in]."""
        return torch.block_diag(*self.left) @ self.core.dense() @ torch.block_diag(*self.right)

    def forward(self, inputs: Tensor) -> Tensor:
        """inputs [..., in] → [..., out]."""
        turned = torch.einsum("kij,...kj->...ki", self.right, inputs.unflatten(-1, (-1, self.size))).flatten(-2)
        found = torch.einsum("kij,...kj->...ki", self.left, self.core(turned).unflatten(-1, (-1, self.size))).flatten(-2)
        return found if self.bias is None else found + self.bias

    def work(self) -> int:
        """Multiplications of A and B for one input; C is a layer itself."""
        return self.left.numel() + self.right.numel()

    def nonzeros(self) -> int:
        """How many values of A, B and C are not zero."""
        return self.core.nonzeros() + self.left.numel() + self.right.numel()

    def settings(self) -> dict[str, Any]:
        """What makes such a layer beside its sizes, as a JSON object."""
        return {"size": self.size, "nonzeros": self.core.weight_values.numel()}

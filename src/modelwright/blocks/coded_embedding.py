"""An embedding whose table is stored without loss, of which only the blocks that are looked up are decoded."""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor

from modelwright.blocks._coded import CodedWeight
from modelwright.blocks._stored import in_a_row
from modelwright.blocks.coded import CodedLinear
from modelwright.maths.prefix_codes import BLOCK


class CodedEmbedding(CodedWeight):
    """Row `id` of a table [rows, columns], times a fixed multiplier, bit by bit what it was. Stored: as `CodedWeight`.

    multiplier: for models that scale their embeddings (Gemma).
    """

    kind = "coded_embedding"

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        nbytes: int,
        stored: str,
        multiplier: float = 1.0,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ):
        super().__init__()
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.out_features, self.in_features, self.multiplier = num_embeddings, embedding_dim, multiplier
        self.hold_empty(nbytes, stored, device)

    @classmethod
    def from_linear(cls, coded: CodedLinear, multiplier: float = 1.0) -> Self:
        """Go on with the tensors of a coded linear [rows, columns] whose rows lie one after another."""
        assert not coded.transposed, coded
        layer = cls(coded.out_features, coded.in_features, multiplier=multiplier, **coded.describe_parts(), device="meta")
        layer.hold(coded.parts())
        return layer

    def dense(self) -> Tensor:
        """The table [rows, columns], without the multiplier."""
        return self.values().view(self.num_embeddings, self.embedding_dim)

    def forward(self, ids: Tensor) -> Tensor:
        """ids [...] → [..., columns], in the table's dtype."""
        columns = torch.arange(self.embedding_dim, device=ids.device)
        places = in_a_row(ids, self.num_embeddings)[:, None] * self.embedding_dim + columns
        blocks, inverse = (places // BLOCK).unique(return_inverse=True)
        rows = self.values(blocks.tolist())[inverse * BLOCK + places % BLOCK].view(*ids.shape, self.embedding_dim)
        return rows if self.multiplier == 1 else rows * torch.tensor(self.multiplier, dtype=rows.dtype, device=rows.device)

    def describe(self) -> dict[str, Any]:
        """The kind, sizes and settings, as a JSON object."""
        return {
            "kind": self.kind,
            "num_embeddings": self.num_embeddings,
            "embedding_dim": self.embedding_dim,
            "multiplier": self.multiplier,
            **self.describe_parts(),
        }

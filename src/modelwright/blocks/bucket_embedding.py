"""An embedding in which ids share rows, by a stored map, by hashes, or by both."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from modelwright.blocks._stored import Stored
from modelwright.maths.hashing import mixed


class BucketEmbedding(Stored):
    """Row `id` is table[map[id]] + Σ over salts of table[hash(id, salt)], times a fixed multiplier.

    Stored: table [buckets, columns]; map int32 [rows] where there is one. multiplier: for models that scale their embeddings.
    """

    kind = "bucket_embedding"
    stands_for_dense = False
    map: Tensor | None

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        buckets: int,
        mapped: bool = True,
        salts: Sequence[int] = (),
        multiplier: float = 1.0,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ):
        super().__init__()
        self.num_embeddings, self.embedding_dim, self.buckets = num_embeddings, embedding_dim, buckets
        self.out_features, self.in_features, self.salts, self.multiplier = num_embeddings, embedding_dim, tuple(salts), multiplier
        self.table = nn.Parameter(torch.empty(buckets, embedding_dim, dtype=dtype, device=device))
        self.register_buffer("map", torch.empty(num_embeddings, dtype=torch.int32, device=device) if mapped else None)

    def places(self, ids: Tensor) -> Tensor:
        """The rows of the table that ids [...] add up, [lookups, ...]."""
        found = [] if self.map is None else [self.map[ids].long()]
        return torch.stack([*found, *(mixed(ids, salt) % self.buckets for salt in self.salts)])

    def dense(self) -> Tensor:
        """The rows of all ids [rows, columns], without the multiplier."""
        return self.table[self.places(torch.arange(self.num_embeddings, device=self.table.device))].sum(0)

    def forward(self, ids: Tensor) -> Tensor:
        """ids [...] → [..., columns]."""
        found = self.table[self.places(ids)].sum(0)
        return found if self.multiplier == 1 else found * self.multiplier

    def nonzeros(self) -> int:
        """How many entries of the table are not zero; on the meta device, how many there can be."""
        return self.table.numel() if self.table.is_meta else int(torch.count_nonzero(self.table))

    def take_bias(self, bias: nn.Parameter | None) -> None:
        """It has none."""

    def why_not(self, old: nn.Module) -> str:
        return "" if isinstance(old, nn.Embedding) else f"is a {type(old).__name__}, which cannot become a {type(self).__name__}"

    def standing_for(self, old: Any) -> Stored:
        """The layer, with the multiplier of the embedding whose place it takes."""
        self.multiplier = float(getattr(old, "embed_scale", 1.0))
        return super().standing_for(old)

    def describe(self) -> dict[str, Any]:
        """The kind, sizes and settings, as a JSON object."""
        return {
            "kind": self.kind,
            "num_embeddings": self.num_embeddings,
            "embedding_dim": self.embedding_dim,
            "buckets": self.buckets,
            "mapped": self.map is not None,
            "salts": list(self.salts),
            "multiplier": self.multiplier,
        }

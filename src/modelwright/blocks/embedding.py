"""An embedding of packed integers, of which only the rows looked up are made dense."""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor

from modelwright.blocks._stored import Stored, in_a_row
from modelwright.blocks.packed import PackedLinear
from modelwright.maths.rounding import decode, pack, packed_words, unpack


class PackedEmbedding(Stored):
    """Row `id` of Ŵ = code · scale, times a fixed multiplier, the codes in a dense stream of 1 to 8 bits each.

    Stored: weight_packed int32 [rows, ceil(columns · bits / 32)], weight_scale [rows, groups], weight_shape int64 [2].
    group: columns that share a scale, a divisor of embedding_dim; None is the whole row. multiplier: for models that
    scale their embeddings (Gemma).
    """

    kind = "embedding"
    weight_packed: Tensor
    weight_scale: Tensor
    weight_shape: Tensor

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        bits: int,
        group: int | None = None,
        multiplier: float = 1.0,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ):
        super().__init__()
        self.num_embeddings, self.embedding_dim, self.bits, self.group = num_embeddings, embedding_dim, bits, group
        self.out_features, self.in_features, self.multiplier = num_embeddings, embedding_dim, multiplier
        words, groups = packed_words(embedding_dim, bits), embedding_dim // (group or embedding_dim)
        self.register_buffer("weight_packed", torch.empty(num_embeddings, words, dtype=torch.int32, device=device))
        self.register_buffer("weight_scale", torch.empty(num_embeddings, groups, dtype=dtype, device=device))
        self.register_buffer("weight_shape", torch.tensor([num_embeddings, embedding_dim], device=device))

    @classmethod
    def from_codes(cls, codes: Tensor, scale: Tensor, bits: int, multiplier: float = 1.0) -> Self:
        """Store signed codes int8 [rows, columns] and scale [rows, groups], of a symmetric grid."""
        layer = cls(
            num_embeddings=codes.shape[0],
            embedding_dim=codes.shape[1],
            bits=bits,
            group=None if scale.shape[1] == 1 else codes.shape[1] // scale.shape[1],
            multiplier=multiplier,
            dtype=scale.dtype,
            device=codes.device,
        )
        layer.weight_packed = pack(codes, bits)
        layer.weight_scale = scale.detach().clone()
        return layer

    @classmethod
    def from_linear(cls, packed: PackedLinear, multiplier: float = 1.0) -> Self:
        """Go on with the tensors of a symmetric packed linear [rows, columns]."""
        layer = cls(
            num_embeddings=packed.out_features, embedding_dim=packed.in_features, bits=packed.bits, group=packed.group,
            multiplier=multiplier, dtype=packed.weight_scale.dtype, device="meta",
        )  # fmt: skip
        for name in ("weight_packed", "weight_scale", "weight_shape"):
            setattr(layer, name, getattr(packed, name))
        return layer

    def dense(self) -> Tensor:
        """Ŵ [rows, columns] in the scales' dtype, without the multiplier."""
        return decode(unpack(self.weight_packed, self.bits, self.embedding_dim), self.weight_scale)

    def forward(self, ids: Tensor) -> Tensor:
        """ids [...] → [..., columns], in the scales' dtype."""
        flat = in_a_row(ids, self.num_embeddings)
        codes = unpack(self.weight_packed[flat], self.bits, self.embedding_dim)
        rows = decode(codes, self.weight_scale[flat]).view(*ids.shape, self.embedding_dim)
        return rows if self.multiplier == 1 else rows * self.multiplier

    def describe(self) -> dict[str, Any]:
        """The kind, sizes and settings, as a JSON object."""
        return {
            "kind": self.kind,
            "num_embeddings": self.num_embeddings,
            "embedding_dim": self.embedding_dim,
            "bits": self.bits,
            "group": self.group,
            "multiplier": self.multiplier,
        }

"""An embedding whose table is folded into a tensor and stored as its parts; only rows that are looked up are made."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from modelwright.blocks._tensor import TensorMatrix
from modelwright.maths.tensor_factors import Form, contract, terms


class TensorEmbedding(TensorMatrix):
    """Row `id` of a table [rows, columns] as in `TensorMatrix`, times a fixed multiplier. Stored: part_0, part_1, ....

    Of every part the slice of the id's digit is taken, and the slices are contracted. multiplier: for models that scale
    their embeddings (Gemma).
    """

    kind = "tensor_embedding"

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        form: Form,
        ranks: Sequence[int],
        rows: Sequence[int],
        columns: Sequence[int],
        multiplier: float = 1.0,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ):
        super().__init__(num_embeddings, embedding_dim, form=form, ranks=ranks, rows=rows, columns=columns, dtype=dtype, device=device)
        self.num_embeddings, self.embedding_dim, self.multiplier = num_embeddings, embedding_dim, multiplier

    def forward(self, ids: Tensor) -> Tensor:
        """ids [...] → [..., columns]."""
        flat, ways, slices = ids.reshape(-1), self.pairs(), self.unfolded()
        letters = terms(self.form, ways)
        for n, way in enumerate(ways):
            place = n + len(letters) - len(ways)
            digit = flat // prod(self.rows[n + 1 :]) % self.rows[n]
            slices[place] = slices[place].index_select(letters[place].index(way[0]), digit)
            letters[place] = letters[place].replace(way[0], "z")
        rows = contract(letters, slices, "z" + "".join(way[1] for way in ways))
        found = rows.reshape(*ids.shape, prod(self.columns))[..., : self.embedding_dim]
        return found if self.multiplier == 1 else found * self.multiplier

    def take_bias(self, bias: nn.Parameter | None) -> None:
        """It has none."""

    def describe(self) -> dict[str, Any]:
        """The kind, sizes and settings, as a JSON object."""
        return {
            "kind": self.kind,
            "num_embeddings": self.num_embeddings,
            "embedding_dim": self.embedding_dim,
            "form": self.form,
            "ranks": list(self.ranks),
            "rows": list(self.rows),
            "columns": list(self.columns),
            "multiplier": self.multiplier,
        }

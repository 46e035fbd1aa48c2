"""One table of rows for any number of features, each with hashes of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from modelwright.blocks._stored import Described
from modelwright.maths.hashing import mixed

SALTS = 1 << 20  # more than a feature has chunks


class UnifiedEmbedding(Described):
    """Row of feature f for a value: c rows of a shared table, each at a place of its own hash, put side by side.

    Coleman et al. 2023, arXiv:2305.12102. features: name → c. The hash of chunk k of feature f is salted with (f, k), by the
    order in which features are given; chunks take the tables in turn, in that order. Any whole number is a value, so that new ones
    need no more rows. Stored: tables [tables, rows, width], once for all features.
    """

    kind = "unified_embedding"

    def __init__(
        self,
        rows: int,
        width: int,
        *,
        features: Mapping[str, int],
        tables: int = 1,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ):
        super().__init__()
        self.rows, self.width, self.features = rows, width, dict(features)
        self.tables = nn.Parameter(torch.empty(tables, rows, width, dtype=dtype, device=device))
        if torch.device(device or "cpu").type != "meta":
            nn.init.normal_(self.tables, std=width**-0.5)

    def places(self, feature: str, values: Tensor) -> tuple[list[int], Tensor]:
        """The table of each chunk, and the rows [..., chunks] of values [...]."""
        names = list(self.features)
        number = names.index(feature)
        before = sum(self.features[name] for name in names[:number])
        chunks = range(self.features[feature])
        rows = torch.stack([mixed(values, number * SALTS + k) % self.rows for k in chunks], -1)
        return [(before + k) % len(self.tables) for k in chunks], rows

    def forward(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Whole numbers [...] by feature → [..., chunks · width] by feature."""
        found = {}
        for feature, each in values.items():
            tables, rows = self.places(feature, each)
            found[feature] = torch.cat([self.tables[table][rows[..., k]] for k, table in enumerate(tables)], -1)
        return found

    def describe(self) -> dict[str, Any]:
        """The kind and sizes, as a JSON object."""
        return {"kind": self.kind, "rows": self.rows, "width": self.width, "features": self.features, "tables": len(self.tables)}

"""A small adapter in the place of an attention or an MLP."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from modelwright.blocks._bottleneck import Bottleneck
from modelwright.blocks._stored import Described


class Adapter(Described):
    """Adds to the stream what a bottleneck gives: the `sum` alone for an MLP, or a `pair` with no weights for an attention.

    Stored: body.entry, body.down and body.up, as in `Bottleneck`. It has no place in the cache.
    """

    kind = "adapter"

    def __init__(
        self, *, features: int, inner: int, gives: Literal["sum", "pair"], dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ):  # fmt: skip
        super().__init__()
        self.features, self.inner, self.gives = features, inner, gives
        self.body = Bottleneck(features, inner, dtype, device)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """hidden_states [..., features] → the same shape."""
        found = self.body(hidden_states)
        return (found, None) if self.gives == "pair" else found

    def describe(self) -> dict[str, Any]:
        """The kind, sizes and what it gives, as a JSON object."""
        return {"kind": self.kind, "features": self.features, "inner": self.inner, "gives": self.gives}

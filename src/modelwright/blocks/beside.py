"""A small adapter beside an attention or an MLP."""

from __future__ import annotations

from typing import Any

import torch

from modelwright.blocks._bottleneck import Bottleneck
from modelwright.blocks._stored import Guest


class Beside(Guest):
    """Adds what a bottleneck makes of the host's input to what the host gives. Stored: body, as in `Bottleneck`."""

    kind = "beside"

    def __init__(self, *, features: int, inner: int, dtype: torch.dtype | None = None, device: torch.device | str | None = None):
        super().__init__()
        self.features, self.width = features, inner
        self.body = Bottleneck(features, inner, dtype, device)

    def around(self, *args: Any, **kwargs: Any) -> Any:
        """What enters the host, hidden_states [..., features] first or by name → what it gives."""
        found, more = self.inner(*args, **kwargs), self.body(args[0] if args else kwargs["hidden_states"])
        return (found[0] + more, *found[1:]) if isinstance(found, tuple) else found + more

    def describe(self) -> dict[str, Any]:
        """The kind and sizes, as a JSON object."""
        return {"kind": self.kind, "features": self.features, "inner": self.width}

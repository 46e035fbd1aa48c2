"""Train a few entries of each matrix, at places drawn once.

Bhardwaj, Pandey, Priyadarshi, Ganapathy, Esteves, Kadambi, Borse, Whatmough, Garrepalli, Van Baalen, Teague, Nagel 2024,
arXiv:2406.13175: a sparse update of rank · (in + out) entries, as many as LoRA has; through peft. `adapt.spiel` moves the places
while it trains.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from torch import nn

from modelwright.core.settings import count
from modelwright.methods.adapt._mechanism import StockAdapter, few


@dataclass(frozen=True, kw_only=True)
class Shira(StockAdapter):
    """An update that is quick to put on and off a model, and of high rank."""

    status: ClassVar[str] = "checked"
    sized_by: ClassVar[tuple[str, ...]] = ("rank",)
    neutral = {}  # the entries start at zero
    small = dict(rank=4)
    config = "ShiraConfig"
    calls = dict(rank="r")
    fixed = dict(random_seed=0)

    rank: int = count(32)  # trained entries are rank · (in + out), fewer than the matrix has

    def adapter(self, layers: Mapping[str, Self], roles: Mapping[str, str]) -> Any:
        config = super().adapter(layers, roles)
        drawn = config.mask_fn
        config.mask_fn = lambda layer, rank, **others: drawn(with_values(layer), rank, **others)
        return config

    def unfit(self, shape: tuple[int, ...]) -> str:
        return few(shape, self.rank * sum(shape[:2]), "rank · (in + out)")


def with_values(layer: nn.Module) -> nn.Module:
    """A layer to draw places for; for one without values, as in plans, another of its kind, because places are found by values."""
    return copy.deepcopy(layer).to_empty(device="cpu") if next(layer.parameters()).is_meta else layer

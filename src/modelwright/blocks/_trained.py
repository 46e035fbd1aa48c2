"""What layers have in common that are trained with rounded weights."""

from __future__ import annotations

from abc import abstractmethod
from typing import Self

from torch import Tensor, nn

from modelwright.blocks._stored import Stored, parameter


class Trained(Stored):
    """Computes with rounded weights. While it is trained it holds the weights that it rounds; packed, the rounded ones alone.

    Stored: weight_master [out, in] until it is packed. Gradients reach it as if nothing was rounded.
    """

    packed: bool
    weight_master: nn.Parameter | None

    @abstractmethod
    def pack(self) -> Self:
        """The layer that stores what this one computes with."""

    @classmethod
    def from_weight(cls, weight: Tensor, **settings: object) -> Self:
        """A layer to be trained from a weight [out, in]."""
        layer = cls(*weight.shape, **settings, dtype=weight.dtype, device=weight.device)  # type: ignore[call-arg]
        layer.weight_master = parameter(weight.clone())
        return layer

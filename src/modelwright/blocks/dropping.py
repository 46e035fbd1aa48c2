"""What drops neurons at run time: it stands in the matrix that they write through, or in their activation function."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from modelwright.blocks._stored import Guest


class Dropping(Guest):
    """Replaces by 0, in each token: inputs up to thresholds of their own, all but the largest inputs, or small outputs.

    Stored: thresholds [features], where there are some. One of features, most and least is given.
    features: how many inputs have a threshold. most: inputs that stay, by size. least: the smallest size of an output that stays.
    """

    kind = "dropping"

    def __init__(
        self,
        *,
        features: int | None = None,
        most: int | None = None,
        least: float | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ):
        super().__init__()
        if sum(given is not None for given in (features, most, least)) != 1:
            raise TypeError("one of features, most and least says what is dropped")
        self.features, self.most, self.least = features, most, least
        if features is not None:
            self.register_buffer("thresholds", torch.empty(features, dtype=dtype, device=device))

    def set_thresholds(self, sizes: Tensor) -> None:
        """Drop inputs whose size is not above these [features], as far as the dtype can say."""
        held = self.get_buffer("thresholds")
        held.copy_(sizes.clamp(max=torch.finfo(held.dtype).max))

    def kept(self, values: Tensor) -> Tensor:
        """Which of the inputs, or of the outputs, [..., n] stay."""
        sizes = values.abs()
        if self.least is not None:
            return sizes >= self.least
        if self.most is not None:
            return torch.zeros_like(sizes, dtype=torch.bool).scatter_(-1, sizes.topk(self.most).indices, True)
        return sizes > self.get_buffer("thresholds")

    def around(self, inputs: Tensor) -> Tensor:
        """inputs [..., n] → what the host gives."""
        if self.least is None:
            return self.inner(torch.where(self.kept(inputs), inputs, 0))
        found = self.inner(inputs)
        return torch.where(self.kept(found), found, 0)

    def describe(self) -> dict[str, Any]:
        """The kind and what is dropped, as a JSON object."""
        rule = {"features": self.features, "most": self.most, "least": self.least}
        return {"kind": self.kind} | {name: value for name, value in rule.items() if value is not None}

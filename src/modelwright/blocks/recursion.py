"""What each use of a block has of its own where several places of a model use one: scalars, and a projection behind it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from modelwright.blocks._bottleneck import Bottleneck
from modelwright.blocks._joining import Ways, joining
from modelwright.blocks._stored import Guest


class Recursion(Guest):
    """x ← c₀ x + c₁ part(norm(x)) for each attention and MLP of the host, and then y ← c₀ y + c₁ up(gelu(down(entry(y)))).

    Shen, Liu, Xing 2022, arXiv:2111.05297: learnable residual connections, and the non-linear projection between recursions. Where
    a host adds both parts to one x, (c₀ - 1) x + c₁ part(norm(x)) of each is what it adds.
    ways: of each part that has scalars, the paths inside the host of its norm and its own. inner: of the projection; 0 for none.
    Stored: scales [2 · ways]; with a projection also projection_scales [2], and body, as in `Bottleneck`.
    """

    kind = "recursion"

    def __init__(
        self, *, features: int, inner: int = 0, ways: Ways = (), dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ):
        super().__init__()
        self.features, self.width, self.ways = features, inner, [list(way) for way in ways]
        if ways:
            self.scales = nn.Parameter(torch.empty(2 * len(ways), dtype=dtype, device=device))
        if inner:
            self.projection_scales = nn.Parameter(torch.empty(2, dtype=dtype, device=device))
            self.body = Bottleneck(features, inner, dtype, device, F.gelu)

    @torch.no_grad()
    def begin(self, rng: torch.Generator) -> None:
        """Scalars of 1, and a projection that adds zeros: the host is at first what it was."""
        for name, value in self.named_parameters(recurse=False):
            self.get_parameter(name).copy_(torch.ones_like(value))
        if self.width:
            self.body.begin(rng)

    def joined(self, number: int, x: Tensor, part: Tensor) -> Tensor:
        """What a part adds to x, so that the sum is c₀ x + c₁ part."""
        return (self.scales[2 * number] - 1) * x + self.scales[2 * number + 1] * part

    def around(self, *args: Any, **kwargs: Any) -> Any:
        """What enters the block → what leaves it, [..., features] first."""
        with joining(self._host[0], self.ways, self.joined):
            found = self.inner(*args, **kwargs)
        if not self.width:
            return found
        out = found[0] if isinstance(found, tuple) else found
        out = self.projection_scales[0] * out + self.projection_scales[1] * self.body(out)
        return (out, *found[1:]) if isinstance(found, tuple) else out

    def describe(self) -> dict[str, Any]:
        """The kind, sizes and paths, as a JSON object."""
        return {"kind": self.kind, "features": self.features, "inner": self.width, "ways": self.ways}

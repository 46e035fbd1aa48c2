"""A change of a weight that is a random map of few values, which all layers share."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from modelwright.blocks._part import Dense, Layer, Part
from modelwright.core.errors import ModelError
from modelwright.maths.projections import Form, draw, fingerprint, project


class Coordinates(nn.Module):
    """The values z [count] that all layers share; 0 at first."""

    def __init__(self, count: int):
        super().__init__()
        self.z = nn.Parameter(torch.zeros(count))


class Subspace(Part):
    """W + λ P z for the z of `Coordinates`. Of P only the seed is saved, with a fingerprint of what it draws.

    shape: of the weight, [out, in]. scale: λ, or None for 1. empty: draws nothing, for values that come from a file.
    """

    seed: Tensor
    drawn_as: Tensor
    scale: Tensor | None

    def __init__(self, form: Form, shape: tuple[int, int], scale: nn.Parameter | None, empty: bool):
        super().__init__()
        self.form, self.shape = form, shape
        number = 0 if empty else int(torch.randint(2**62, (), device="cpu"))
        self.register_buffer("seed", torch.tensor(number))
        self.register_buffer("drawn_as", torch.tensor(0 if empty else fingerprint(number)))
        self.register_parameter("scale", scale)
        self._drawn: tuple[Tensor, ...] = ()

    def drawn(self) -> tuple[Tensor, ...]:
        """What P is made of.

        Raises:
            ModelError: this torch draws other numbers than the one that it was trained with.
        """
        z = self.shared.z
        if not self._drawn:
            if fingerprint(seed := int(self.seed)) != int(self.drawn_as):
                raise ModelError("This torch draws other random numbers than the one that made the adapter. Fold it with that one.")
            self._drawn = draw(self.form, self.shape[0] * self.shape[1], len(z), torch.Generator().manual_seed(seed))
        if self._drawn[0].device != z.device:
            self._drawn = tuple(value.to(z.device) for value in self._drawn)
        return self._drawn

    def change(self) -> Tensor:
        """λ P z, [out, in]."""
        found = project(self.form, self.shared.z, self.shape[0] * self.shape[1], self.drawn()).view(self.shape)
        return found if self.scale is None else self.scale * found

    def forward(self, x: Tensor, layer: Layer) -> Tensor:
        own = layer(x)
        return own + F.linear(x.to(self.shared.z.dtype), self.change()).to(own.dtype)

    @torch.no_grad()
    def merged(self, weight: Tensor, bias: Tensor | None) -> Dense:
        return (weight.float() + self.change()).to(weight.dtype), bias

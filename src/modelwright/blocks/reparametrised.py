"""The reparametrised layer: weight mask ⊙ [(I + Λ) W + s · B C A + scatter], bias (I + Λ) b + β."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from modelwright.blocks._part import Dense, Layer, Part, shaped


class Thin(nn.Module, ABC):
    """B M A, an update through few dimensions."""

    @abstractmethod
    def parts(self) -> tuple[Tensor, Tensor | float, Tensor]:
        """B [out, r]; M [r] for a diagonal, [r, r], or a number; A [r, in]."""

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] → [..., out], in the product's own dtype."""
        up, middle, down = self.parts()
        return times(x.to(down.dtype) @ down.T, middle, turned=True) @ up.T

    def factors(self) -> tuple[Tensor, Tensor]:
        """B M [out, r], and A [r, in]."""
        up, middle, down = self.parts()
        return times(up, middle), down

    def on(self, weight: Tensor) -> Tensor:
        """The product times a matrix [in, ...], or a vector [in]."""
        up, down = self.factors()
        return up @ (down @ weight)


class Product(Thin):
    """B (s C - F) A.

    up: B [out, r]. down: A [r, in]. core: C, [r] for a diagonal, [r, r], a module that gives one of these, or None for the identity.
    scale: s. fixed: F, like C: s C as it is at first, where only what changes is to count. Each is a parameter where it trains, and a
    plain tensor where it is held. dropout: of the inputs, while training.
    """

    up: Tensor
    down: Tensor
    fixed: Tensor | None
    scale: float | Tensor

    def __init__(self, up: Tensor, down: Tensor, core: Tensor | nn.Module | None = None, fixed: Tensor | None = None, *,
                 scale: float | nn.Parameter = 1.0, dropout: float = 0.0):  # fmt: skip
        super().__init__()
        hold(self, up=up, down=down, core=core, fixed=fixed, scale=scale)
        self.dropout = nn.Dropout(dropout)

    def parts(self) -> tuple[Tensor, Tensor | float, Tensor]:
        core = self.core() if isinstance(self.core, nn.Module) else self.core
        scaled = self.scale if core is None else core if isinstance(self.scale, float) and self.scale == 1 else core * self.scale
        return self.up, scaled if self.fixed is None else scaled - self.fixed, self.down

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.dropout(x))


def times(rows: Tensor, core: Tensor | float, turned: bool = False) -> Tensor:
    """Rows [..., r] times a matrix [r, r], of which a vector is the diagonal and a number all of it; turned: times its transpose."""
    if isinstance(core, Tensor) and core.ndim == 2:
        return rows @ (core.T if turned else core)
    return rows if isinstance(core, float) and core == 1 else rows * core


class Band(nn.Module):
    """A square matrix whose entries train up to `reach` places from the diagonal, and are 0 elsewhere; all are 0 first."""

    def __init__(self, size: int, reach: int):
        super().__init__()
        self.size, self.reach = size, min(reach, size - 1)
        self.values = nn.Parameter(torch.zeros(size * (2 * self.reach + 1) - self.reach * (self.reach + 1)))

    def forward(self) -> Tensor:
        """[size, size]."""
        places = torch.arange(self.size, device=self.values.device)
        near = (places - places[:, None]).abs() <= self.reach
        return self.values.new_zeros(self.size, self.size).masked_scatter(near, self.values)


class Reparametrised(Part):
    """A layer with an update beside its weight, on its outputs, and with scales and shifts of these; what is None is left out.

    update: s B C A, added to the weight. outer: Λ as a product, [out, out]. factor: 1 + Λ as a diagonal [out]. shift: β [out].
    The layer gives (I + Λ) y + s B C A x + β for its own outputs y.
    """

    factor: Tensor | None
    shift: Tensor | None

    def __init__(self, update: Thin | None = None, *, outer: Product | None = None, factor: Tensor | None = None,
                 shift: Tensor | None = None):  # fmt: skip
        super().__init__()
        assert outer is None or factor is None, "Λ is a diagonal or a product"
        self.update, self.outer = update, outer
        hold(self, factor=factor, shift=shift)

    def forward(self, x: Tensor, layer: Layer) -> Tensor:
        own = layer(x)
        total = own if self.factor is None else own * shaped(self.factor.to(own.dtype), own, layer.module)
        if self.outer is not None:
            total = total + self.outer(own).to(own.dtype)
        if self.update is not None:
            total = total + self.update(x).to(own.dtype)
        return total if self.shift is None else total + shaped(self.shift.to(own.dtype), own, layer.module)

    def effective(self, weight: Tensor, bias: Tensor | None) -> Dense:
        """The weight and bias of the layer with this part, through which gradients pass."""
        total, moved = weight, bias
        if self.factor is not None:
            total = weight * self.factor.view(-1, *[1] * (weight.ndim - 1))
            moved = None if bias is None else bias * self.factor
        if self.outer is not None:
            total = total + self.outer.on(weight.flatten(1)).view_as(weight)
            moved = None if bias is None or moved is None else moved + self.outer.on(bias)
        if self.update is not None:
            up, down = self.update.factors()
            total = total + up @ down
        if self.shift is not None:
            moved = self.shift if moved is None else moved + self.shift
        return total, moved

    @torch.no_grad()
    def merged(self, weight: Tensor, bias: Tensor | None) -> Dense:
        total, moved = self.effective(weight.float(), None if bias is None else bias.float())
        return total.to(weight.dtype), None if moved is None else moved.to(weight.dtype)

    def factors(self) -> tuple[Tensor, Tensor] | None:
        plain = self.update is not None and self.outer is None and self.factor is None and self.shift is None
        return self.update.factors() if plain and self.update is not None else None


def hold(module: nn.Module, **values: Tensor | nn.Module | float | None) -> None:
    """Give a module values by name: parameters train, other tensors are saved as they are, and numbers are not saved."""
    for name, value in values.items():
        if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
            module.register_buffer(name, value)
        elif isinstance(value, nn.Parameter) or value is None:
            module.register_parameter(name, value)
        else:
            setattr(module, name, value)

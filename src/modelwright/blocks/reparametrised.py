"""The reparametrised layer: weight mask ⊙ [(I + Λ) W + s · B C A + scatter], bias (I + Λ) b + β."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from modelwright.blocks._part import Dense, Layer, Part, placed, places, shaped


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

    def select(self, dim: int, index: Tensor) -> None:
        """Keep these outputs (dim 0) or inputs (dim 1) alone."""
        take(self, "down" if dim else "up", dim, index)

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


class Scatter(nn.Module):
    """s · S, a matrix [out, in] with few entries that are not 0.

    values: v [k], which train. places: their positions [k] in the matrix, row after row, all different; None for all, in order. scale: s.
    Backward makes the gradient of a whole matrix, takes v's from it and lets it go; `watch` is shown it in between, as a vector.
    """

    values: Tensor
    places: Any  # int32 or int64 [k], or None

    def __init__(self, shape: tuple[int, int], places: Tensor | None, values: Tensor, *, scale: float = 1.0):
        super().__init__()
        hold(self, places=places, values=values)
        self.shape, self.scale = shape, scale
        self.watch: Callable[[Tensor], None] | None = None

    def change(self) -> Tensor:
        """s · S [out, in]."""
        if self.places is None:
            return (self.values * self.scale).view(self.shape)
        flat = self.values.new_zeros(self.shape[0] * self.shape[1])
        return flat.index_put((self.places.long(),), self.values * self.scale).view(self.shape)

    @torch.no_grad()
    def select(self, dim: int, index: Tensor) -> None:
        """Keep these outputs (dim 0) or inputs (dim 1) alone; of an empty scatter about as many entries."""
        before, size = self.shape, self.shape[dim]
        self.shape = (before[0], len(index)) if dim else (len(index), before[1])
        if self.places is None or self.places.is_meta:
            count = self.shape[0] * self.shape[1] if self.places is None else len(self.values) * len(index) // size
            stays = self.values.view(before).index_select(dim, index).flatten() if self.places is None else self.values[:count]
            self.values = nn.Parameter(stays, self.values.requires_grad)
            self.places = None if self.places is None else self.places[:count]
            return
        now = torch.full((size,), -1, device=index.device).index_put((index,), torch.arange(len(index), device=index.device))
        at = [(self.places // before[1]).long(), (self.places % before[1]).long()]
        at[dim] = now[at[dim]]
        left = at[dim] >= 0
        self.places = (at[0] * self.shape[1] + at[1])[left].to(self.places.dtype)
        self.values = nn.Parameter(self.values[left], self.values.requires_grad)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] → [..., out], in the values' dtype."""
        return _Scattered.apply(x.to(self.values.dtype), self.values, self)


class _Scattered(torch.autograd.Function):
    """x Sᵀ of a Scatter, of which neither S nor its gradient is kept from one pass to the other."""

    @staticmethod
    def forward(context: Any, x: Tensor, values: Tensor, scatter: Scatter) -> Tensor:  # type: ignore[override]
        context.save_for_backward(x)
        context.scatter = scatter
        return nn.functional.linear(x, scatter.change())

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:  # type: ignore[override]
        (x,), scatter = context.saved_tensors, context.scatter
        gradient, of_values = gradient.to(x.dtype), None
        if context.needs_input_grad[1]:
            rows, columns = scatter.shape
            whole = (gradient.reshape(-1, rows).T @ x.reshape(-1, columns)).flatten().mul_(scatter.scale)
            if scatter.watch is not None:
                scatter.watch(whole)
            of_values = whole if scatter.places is None else whole[scatter.places]
        return gradient @ scatter.change() if context.needs_input_grad[0] else None, of_values, None


def low_rank(rows: int, columns: int, rank: int, scale: float = 1.0, dropout: float = 0.0) -> Product | None:
    """B = 0 [rows, rank], and A [rank, columns] uniform within ±1/√columns, which train; None of rank 0."""
    if rank == 0:
        return None
    down = nn.init.kaiming_uniform_(torch.empty(rank, columns), a=math.sqrt(5))
    return Product(nn.Parameter(torch.zeros(rows, rank)), nn.Parameter(down), scale=scale, dropout=dropout)


class Reparametrised(Part):
    """A layer with an update beside its weight, on its outputs, and with scales and shifts of these; what is None is left out.

    update: s B C A, and scatter: s S, are added to the weight; the update of a convolution's at the middle of its kernel. outer: Λ as a
    product, [out, out]. factor: 1 + Λ as a diagonal [out]. shift: β [out].
    The layer gives (I + Λ) y + s B C A x + s S x + β for its own outputs y.
    """

    selectable = True
    factor: Tensor | None
    shift: Tensor | None

    def __init__(self, update: Thin | None = None, *, scatter: Scatter | None = None, outer: Product | None = None,
                 factor: Tensor | None = None, shift: Tensor | None = None):  # fmt: skip
        super().__init__()
        assert outer is None or factor is None, "Λ is a diagonal or a product"
        self.update, self.scatter, self.outer = update, scatter, outer
        hold(self, factor=factor, shift=shift)

    def forward(self, x: Tensor, layer: Layer) -> Tensor:
        own = layer(x)
        total = own if self.factor is None else own * shaped(self.factor.to(own.dtype), own, layer.module)
        if self.outer is not None:
            total = total + self.outer(own).to(own.dtype)
        if self.update is not None:
            total = total + placed(self.update(places(x, own, layer.module)), layer.module).to(own.dtype)
        if self.scatter is not None:
            total = total + self.scatter(x).to(own.dtype)
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
            total = total + centred(up @ down, weight)
        if self.scatter is not None:
            total = total + self.scatter.change()
        if self.shift is not None:
            moved = self.shift if moved is None else moved + self.shift
        return total, moved

    @property
    def additive(self) -> bool:
        """Whether it only adds to the weight."""
        return self.outer is None and self.factor is None and self.shift is None

    def select(self, dim: int, index: Tensor) -> None:
        for part in (self.update, self.scatter):
            if part is not None:
                part.select(dim, index)
        if self.outer is not None and dim == 0:
            self.outer.select(0, index)
            self.outer.select(1, index)
        for name in ("factor", "shift"):
            if (own := getattr(self, name)) is not None and len(own) > 1 and dim == 0:  # one number is that of all outputs
                take(self, name, 0, index)

    def adjust(self, found: dict[str, tuple[int, ...]]) -> None:
        if self.scatter is not None and self.scatter.places is not None and "scatter.values" in found:
            values, sizes = self.scatter.values, found["scatter.values"]
            if values.shape != sizes:
                self.scatter.values = nn.Parameter(values.new_zeros(sizes), values.requires_grad)
                self.scatter.places = self.scatter.places.new_zeros(sizes)

    @torch.no_grad()
    def merged(self, weight: Tensor, bias: Tensor | None) -> Dense:
        total, moved = self.effective(weight.float(), None if bias is None else bias.float())
        return total.to(weight.dtype), None if moved is None else moved.to(weight.dtype)

    def factors(self) -> tuple[Tensor, Tensor] | None:
        return self.update.factors() if self.update is not None and self.scatter is None and self.additive else None


def centred(change: Tensor, weight: Tensor) -> Tensor:
    """A matrix [out, in] as a change of a weight: of a convolution's at the middle of its kernel."""
    if weight.ndim == 2:
        return change
    spread = change.new_zeros(weight.shape)
    middle: Any = (..., *(side // 2 for side in weight.shape[2:]))
    spread[middle] = change
    return spread


def hold(module: nn.Module, **values: Tensor | nn.Module | float | None) -> None:
    """Give a module values by name: parameters train, other tensors are saved as they are, and numbers are not saved."""
    for name, value in values.items():
        if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
            module.register_buffer(name, value)
        elif isinstance(value, nn.Parameter) or value is None:
            module.register_parameter(name, value)
        else:
            setattr(module, name, value)


@torch.no_grad()
def take(module: nn.Module, name: str, dim: int, index: Tensor) -> None:
    """Keep these rows (dim 0) or columns (dim 1) of a module's tensor alone."""
    value = getattr(module, name)
    kept = value.index_select(dim, index)
    setattr(module, name, nn.Parameter(kept, value.requires_grad) if isinstance(value, nn.Parameter) else kept)

"""Grids: the points that a stored weight [out, in] can take, with a scale for each group of a row's columns.

A grid is fitted to a weight once. A solver then asks which point is nearest (`encode`, or `near` for one column at a time, as
GPTQ does), and `decode` gives the weights that codes stand for.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from modelwright.maths import rounding, scales
from modelwright.maths.levels import Levels, k_means, named

TILE = 128  # rows and columns that share a scale of 8-bit floats, where tiles are asked for
Near = Callable[[Tensor], Tensor]  # the nearest points to a column [out]


class Grid(ABC):
    """The points that the weights of one matrix can take."""

    groups: int  # of the columns, each with a scale of its own

    @abstractmethod
    def encode(self, weight: Tensor) -> Tensor:
        """The codes [out, in] of the nearest points to a weight [out, in]."""

    @abstractmethod
    def decode(self, codes: Tensor) -> Tensor:
        """The points that codes [out, in] stand for."""

    @abstractmethod
    def near(self, group: int) -> Near:
        """What gives the nearest points to a column of this group, in float32."""


@dataclass(frozen=True)
class Affine(Grid):
    """Whole numbers: (code - zero) · scale, of `maths.rounding`."""

    scale: Tensor  # [out, groups]
    zero: Tensor | None  # int8 [out, groups], or floats
    bits: int

    @property
    def groups(self) -> int:  # type: ignore[override]
        return self.scale.shape[1]

    def encode(self, weight: Tensor) -> Tensor:
        return rounding.encode(weight, self.scale, self.zero, self.bits)

    def decode(self, codes: Tensor) -> Tensor:
        return rounding.decode(codes, self.scale, self.zero)

    def near(self, group: int) -> Near:
        step = self.scale[:, group].float()
        shift = torch.zeros_like(step) if self.zero is None else self.zero[:, group].float()
        low, high = -(2.0 ** (self.bits - 1)) - shift, 2.0 ** (self.bits - 1) - 1 - shift
        if self.zero is not None and self.zero.is_floating_point():
            return lambda column: ((column / step + shift).round_() - shift).clamp_(low, high).mul_(step)
        return lambda column: (column / step).round_().clamp_(low, high).mul_(step)


@dataclass(frozen=True)
class Scaled(Grid):
    """A table of levels: level[code] · scale, with the scale as it is stored."""

    table: Levels
    stored: Mapping[str, Tensor]  # the scales, as `maths.scales.store` gives them
    form: str  # of `maths.scales.FORMS`

    @functools.cached_property
    def scale(self) -> Tensor:
        """Float32 [out, groups]."""
        return scales.read(self.stored, self.form)

    @property
    def groups(self) -> int:  # type: ignore[override]
        return self.stored["weight_scale"].shape[1]

    def encode(self, weight: Tensor) -> Tensor:
        parts = zip(weight.split(rounding.ROWS), self.scale.split(rounding.ROWS), strict=True)
        codes = [self.table.encode(_safe(part.float().view(*scale.shape, -1), scale[..., None])) for part, scale in parts]
        return torch.cat(codes).view(weight.shape)

    def decode(self, codes: Tensor) -> Tensor:
        grouped = self.table.decode(codes).view(len(codes), self.groups, -1)
        return grouped.mul_(self.scale[..., None]).view(codes.shape)

    def near(self, group: int) -> Near:
        step = self.scale[:, group]
        return lambda column: self.table.snap(_safe(column, step)).mul_(step)


@dataclass(frozen=True)
class Float8(Grid):
    """Floats of 8 bits (E4M3) times a scale: of each row [out, 1], of the matrix [1], or of each 128 by 128 [⌈out/128⌉, in/128]."""

    stored: Tensor  # the scales
    rows: int

    @functools.cached_property
    def scale(self) -> Tensor:
        """Float32 [out, groups]."""
        whole = self.stored.float().view(-1, 1) if self.stored.ndim == 1 else self.stored.float()
        if len(whole) == self.rows:
            return whole
        return whole.repeat_interleave(self.rows if self.stored.ndim == 1 else TILE, 0)[: self.rows]

    @property
    def groups(self) -> int:  # type: ignore[override]
        return self.scale.shape[1]

    def encode(self, weight: Tensor) -> Tensor:
        grouped = weight.float().view(len(weight), self.groups, -1)
        return to_float8(_safe(grouped, self.scale[..., None])).view(weight.shape)

    def decode(self, codes: Tensor) -> Tensor:
        return (codes.float().view(len(codes), self.groups, -1) * self.scale[..., None]).view(codes.shape)

    def near(self, group: int) -> Near:
        step = self.scale[:, group]
        return lambda column: to_float8(_safe(column, step)).float().mul_(step)


def to_float8(values: Tensor) -> Tensor:
    """Nearest E4M3; what is too large is the largest, 448."""
    return values.clamp(-scales.LARGEST, scales.LARGEST).to(torch.float8_e4m3fn)


def _safe(values: Tensor, scale: Tensor) -> Tensor:
    """Values over scales, of which those that are 0 or below (a quantised scale may be) make zeros."""
    return torch.where(scale > 0, values / torch.where(scale > 0, scale, 1), 0)


def affine(weight: Tensor, bits: int, group: int | None, *, symmetric: bool = True, search: bool = False, even: bool = False) -> Affine:
    """Whole numbers of `bits` bits, fitted as `rounding.scales` does."""
    return Affine(*rounding.scales(weight, bits, group, symmetric=symmetric, mse=search, even=even), bits)


def float8(weight: Tensor, scope: str = "row") -> Float8:
    """Floats of 8 bits with scales max|w| / 448 in the weight's dtype; scope: `row`, `tensor`, or `tile` of 128 by 128.

    weight: [out, in]; with tiles, `in` is a multiple of 128.
    """
    size = weight.detach().abs().float()
    if scope == "tensor":
        largest = size.amax().view(1)
    elif scope == "row":
        largest = size.amax(1, keepdim=True)
    else:
        assert scope == "tile" and size.shape[1] % TILE == 0, (scope, size.shape)
        padded = torch.nn.functional.pad(size, (0, 0, 0, -len(size) % TILE))
        largest = padded.view(-1, TILE, size.shape[1] // TILE, TILE).amax((1, 3))
    return Float8((largest / scales.LARGEST).to(weight.dtype).clamp_(min=rounding.smallest_scale(weight.dtype)), len(weight))


def scaled(
    weight: Tensor, table: Levels | str, group: int | None, form: str, *,
    rule: Literal["largest", "mean"] = "largest", search: bool = False, doubling: bool = False, bits: int = 4,
) -> Scaled:  # fmt: skip
    """A table of levels, or its name, with scales such that the largest weight of a group is the largest level, or 1 for k-means.

    weight: [out, in]; `in` is a multiple of group; None is the whole row. rule: `mean` makes the scale the mean size of the weights.
    search: also try scales smaller by 1 to 79 percent, and keep the one with the least Σ|error|^2.4. doubling: of powers of two,
    the next higher one from 1.75 times a power on, as compressed-tensors does (OCP rounds down). k-means: name "k-means", of `bits`.
    """
    grouped = weight.detach().float().view(len(weight), weight.shape[1] // (group or weight.shape[1]), -1)
    size = grouped.abs().mean(-1) if rule == "mean" else grouped.abs().amax(-1)
    learned = table == "k-means"
    if learned:
        table = k_means(_safe(grouped, size[..., None]), bits)
    table = named(table, bits) if isinstance(table, str) else table
    scale = size if rule == "mean" or learned else size / _reach(table, form)  # k-means saw the weights over their sizes
    scale = scale * (8 / 7) if doubling else scale  # 1.75 · 8/7 = 2
    make: Callable[[float], Scaled] = lambda share: Scaled(table, scales.store(scale * share, form, weight.dtype), form)  # noqa: E731
    if not search:
        return make(1.0)
    best = torch.ones_like(scale)
    least = _error(grouped, make(1.0))
    for step in range(1, rounding.CLIPS):
        error = _error(grouped, make(1 - step / 100))
        best = torch.where(error < least, 1 - step / 100, best)
        least = torch.minimum(error, least)
    return Scaled(table, scales.store(scale * best, form, weight.dtype), form)


def _reach(table: Levels, form: str) -> float:
    """What of a group's largest weight one scale is: the largest level; a power of two below it for scales that are powers of two."""
    return 2.0 ** int(torch.tensor(table.largest).log2().floor()) if form == "e8m0" else table.largest


def _error(grouped: Tensor, grid: Scaled) -> Tensor:
    def of(part: Tensor, scale: Tensor) -> Tensor:
        near = grid.table.snap(_safe(part, scale)).mul_(scale)
        return near.sub_(part).abs_().pow_(rounding.NORM).sum(-1)

    return torch.cat([of(*both) for both in zip(grouped.split(rounding.ROWS), grid.scale[..., None].split(rounding.ROWS), strict=True)])


def nearest(weight: Tensor, grid: Grid) -> Tensor:
    """The weights on the grid that are nearest."""
    return grid.decode(grid.encode(weight))

"""Quantisation: a grid fitted to each weight, codes chosen by a solver, packed storage.

A method fills in the solver: `quantize.rtn` takes the nearest code, `quantize.gptq` passes each column's error on to the columns
that are still to come. `grid` says which points there are; a preset such as `quantize.nf4` is a solver with a grid of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

from torch import Tensor, nn

from modelwright.blocks.levels import LevelsLinear
from modelwright.blocks.packed import PackedLinear
from modelwright.blocks.static import StaticLinear
from modelwright.core.method import LayerMethod, SiteMethod
from modelwright.core.settings import count
from modelwright.core.statistics import Statistics
from modelwright.maths import grids
from modelwright.maths.grids import Affine, Grid, Scaled
from modelwright.maths.static_inputs import CLIPS, rounded, steps

SMALLEST_GROUP = 16  # a scale for fewer weights costs more than it saves


class Kind(NamedTuple):
    """What a grid of levels is made of."""

    levels: str  # a name in `maths.levels`
    scales: str  # how they are stored, of `maths.scales`
    bits: int | None = None  # where there is no choice
    group: int | None = None
    zero: bool = True  # one of the levels


KINDS = {
    "nf4": Kind("nf4", "float32", 4), "fp4": Kind("e2m1", "own", 4), "mxfp4": Kind("e2m1", "e8m0", 4, 32),
    "nvfp4": Kind("e2m1", "e4m3", 4, 16), "k-means": Kind("k-means", "own", zero=False), "odd": Kind("odd", "own", zero=False),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Packer(SiteMethod):
    """Stores each chosen matrix in fewer bits."""

    sites: ClassVar[tuple[str, ...]] = ("attn", "mlp", "experts", "linear")
    leaves: ClassVar[frozenset[str]] = frozenset({"packed"})
    drops: ClassVar[frozenset[str]] = frozenset({"float"})

    def unfit(self, shape: tuple[int, ...]) -> str:
        return "" if len(shape) == 2 else f"has the shape {list(shape)}, and packed weights are for matrices"

    def promise(self) -> dict[str, Any]:
        bits = getattr(self, "bits", None)  # of those that have one number of them for all places
        return {"bits": bits} if isinstance(bits, int) else {}


@dataclass(frozen=True, kw_only=True)
class Trainable(Packer):
    """Puts layers in the place of matrices that round their weights as they compute, and still hold them, to be trained."""

    leaves: ClassVar[frozenset[str]] = frozenset({"rounding"})
    drops: ClassVar[frozenset[str]] = frozenset()


@dataclass(frozen=True, kw_only=True)
class Both(Packer):
    """Rounds weights to integers with a scale for each row, and inputs, as they come, with one for each token."""

    bits: int = count(8, 2, 8, "bits")  # per weight
    inputs: int = count(8, 2, 8, "bits")  # per input

    def form(self) -> dict[str, Any]:
        """The settings of the layer."""
        return {"bits": self.bits, "inputs": self.inputs}

    def packed(self, weight: Tensor) -> nn.Module:
        """The layer that stores a weight [out, in]."""
        grid = grids.affine(weight, self.bits, None, even=True)
        return PackedLinear.from_codes(grid.encode(weight), grid.scale, None, **self.form())

    def planned(self, weight: Tensor) -> nn.Module:
        return PackedLinear(*weight.shape, **self.form(), dtype=weight.dtype, device="meta")


@dataclass(frozen=True, kw_only=True)
class Stepped(Packer, LayerMethod):
    """Rounds inputs by steps for each channel that are merged into what makes them and into the weights, which are rounded row by row."""

    fails = {"only_chosen_sites_change": "what makes the inputs of a chosen matrix is divided by what they are multiplied by"}

    bits: int = count(4, 2, 8, "bits")  # per weight
    inputs: int = count(4, 2, 16, "bits")  # per input

    def sizes(self, statistics: Statistics) -> Tensor:
        """The largest size of each input [in] that a step must reach."""
        return statistics.largest

    def together(self, statistics: Statistics) -> tuple[Tensor | None, Tensor]:
        """Of all inputs of a matrix together: what to take from them [1], if anything, and the largest size then [1]."""
        return None, self.sizes(statistics).max().view(1)

    def columns(self, merged: Tensor, inputs: Tensor) -> list[tuple[Tensor, Tensor] | None]:
        """Other columns for a merged weight: which input each reads [in], and the share of that one's column; None for its own."""
        return [None]

    def rescales(self) -> bool:
        return True

    def rescale(
        self, kind: str, readers: Sequence[tuple[Stepped, Tensor]], statistics: Statistics, harm: Callable[[Sequence[Tensor]], float]
    ) -> Tensor | None:
        tried = [steps(self.sizes(statistics), clip, self.inputs) for clip in CLIPS]
        return min(tried, key=lambda step: sum(own.best(weight.float() * step, statistics.sample / step)[0] for own, weight in readers))

    def layer(self, weight: Tensor, statistics: Statistics) -> nn.Module:
        tried: list[Tensor | None] = [None]
        shift, largest = (None, None) if statistics.rescaled else self.together(statistics)
        if largest is not None:
            tried = [steps(largest, clip, self.inputs) for clip in CLIPS]
        found = []
        for step in tried:
            given = statistics.sample if shift is None else statistics.sample - shift
            merged, given = (weight, given) if step is None else (weight.float() * step, given / step)
            found.append((*self.best(merged.to(weight.dtype), given), step))
        _, grid, codes, index, step = min(found, key=lambda one: one[0])
        return StaticLinear.of(codes, grid.scale, bits=self.bits, inputs=self.inputs, step=step, index=index, shift=shift)

    def best(self, merged: Tensor, inputs: Tensor) -> tuple[float, grids.Affine, Tensor, Tensor | None]:
        """The error on inputs in steps [tokens, in] of a matrix for them, its grid, codes and the inputs that its columns read."""
        exact, numbers = inputs @ merged.float().T, rounded(inputs, self.inputs)
        found = []
        for other in self.columns(merged, inputs):
            index, columns = (None, merged) if other is None else (other[0], (merged[:, other[0]].float() * other[1]).to(merged.dtype))
            grid = grids.affine(columns, self.bits, None, even=True)
            codes = grid.encode(columns)
            given = numbers if index is None else numbers[:, index]
            found.append((float((given @ grid.decode(codes).float().T - exact).square().sum()), grid, codes, index))
        return min(found, key=lambda one: one[0])


@dataclass(frozen=True, kw_only=True)
class Grouped(Packer):
    """Stores weights with a scale for each group of a row's."""

    group: int = count(128, low=0, unit="weights")  # of a row that share a scale; 0 for the whole row

    def group_of(self, columns: int) -> int | None:
        """The group for rows of this many inputs: the largest divisor they share, or None, the whole row, where that is small."""
        group = math.gcd(self.group, columns) if self.group else columns
        return None if group == columns or group < min(self.group, SMALLEST_GROUP) else group

    def otherwise(self, shape: tuple[int, ...]) -> str:
        columns = shape[-1]
        if not self.group or columns % self.group == 0:
            return ""
        if columns < self.group:
            return f"have one scale for a row, because their {columns} inputs are fewer than {self.group}"
        group = self.group_of(columns)
        found = f"groups of {group}" if group else "one scale for a row"
        return f"have {found}, because {self.group} does not divide their {columns} inputs"


@dataclass(frozen=True, kw_only=True)
class Quantizer(Grouped):
    """Stores each chosen weight as the codes of a grid's points, with a scale per group."""

    grid: Literal["integer", "nf4", "fp4", "mxfp4", "nvfp4", "k-means", "odd"] = "integer"  # the points that weights can take
    bits: int = count(4, 2, 8, "bits")  # per weight
    symmetric: bool = True  # of integers; false adds zero points, and then modelwright is needed to load
    search: bool = False  # shrink each group's range to the one with the least error, as GPTQ's authors offer
    nested: bool = False  # store the scales in 8 bits, with scales of their own

    def lost(self) -> frozenset[str]:
        return self.drops if self.holds_zeros() else self.drops | {"sparse"}

    def holds_zeros(self) -> bool:
        """Whether a weight can be 0 on the grid."""
        return self.grid not in KINDS or KINDS[self.grid].zero

    def problems(self) -> list[str]:
        kind = KINDS.get(self.grid)
        if kind is None:
            return ["nested scales are for other grids than integer. Leave nested out."] if self.nested else []
        found = []
        if kind.bits and self.bits != kind.bits:
            found.append(f"grid {self.grid} has {kind.bits} bits; got bits {self.bits}. Leave bits out.")
        if kind.group and self.group != kind.group:
            found.append(f"grid {self.grid} has groups of {kind.group} weights; got group {self.group}. Set group: {kind.group}.")
        if self.nested and kind.scales.startswith("e"):
            found.append(f"the scales of grid {self.grid} have 8 bits already. Leave nested out.")
        if self.symmetric < type(self).symmetric:  # a method whose integers have zero points by default asks for none here
            found.append(f"zero points are for the grid integer; got {self.grid}. Leave symmetric out.")
        return found

    def fitted(self, weight: Tensor) -> Grid:
        """The grid for a weight [out, in]."""
        group, kind = self.group_of(weight.shape[1]), KINDS.get(self.grid)
        if kind is None:
            return grids.affine(weight, self.bits, group, symmetric=self.symmetric, search=self.search)
        form = "nested" if self.nested else kind.scales
        return grids.scaled(weight, kind.levels, group, form, search=self.search, doubling=form == "e8m0", bits=self.bits)

    def stored(self, grid: Grid, codes: Tensor, weight: Tensor) -> nn.Module:
        """The layer that stores the codes [out, in] of a weight."""
        if isinstance(grid, Affine):
            return PackedLinear.from_codes(codes, grid.scale, grid.zero, bits=grid.bits)
        assert isinstance(grid, Scaled)
        return LevelsLinear.from_codes(codes, grid, KINDS[self.grid].levels, weight.dtype)

    def planned(self, weight: Tensor) -> nn.Module:
        sizes: dict[str, Any] = dict(out_features=weight.shape[0], in_features=weight.shape[1], bits=self.bits,
                                     group=self.group_of(weight.shape[1]), dtype=weight.dtype, device="meta")  # fmt: skip
        if (kind := KINDS.get(self.grid)) is None:
            return PackedLinear(**sizes, symmetric=self.symmetric)
        return LevelsLinear(**sizes, levels=kind.levels, scales="nested" if self.nested else kind.scales)

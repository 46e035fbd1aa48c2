"""What layers of tensor parts have in common."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from modelwright.blocks._stored import Stored
from modelwright.maths.tensor_factors import Form, contract, shapes_of, spread, terms


class TensorStored(Stored):
    """A layer whose weight is a tensor stored as the parts of `maths.tensor_factors`: part_0, part_1 and so on."""

    stands_for_dense: ClassVar[bool] = False
    form: Form
    ranks: tuple[int, ...]

    def hold(self, form: Form, shape: Sequence[int], ranks: Sequence[int], dtype: torch.dtype | None, device: Any) -> None:
        """Have empty parts of a tensor of this shape."""
        self.form, self.ranks, self.tensor_shape = form, tuple(ranks), tuple(shape)
        for n, size in enumerate(shapes_of(form, shape, ranks, self.fixed)):
            self.register_parameter(f"part_{n}", nn.Parameter(torch.empty(size, dtype=dtype, device=device)))

    @property
    def fixed(self) -> tuple[int, ...]:
        """The ways that have no factor in Tucker."""
        return ()

    @property
    def parts(self) -> list[Tensor]:
        """The parts, in their order."""
        return [self.get_parameter(f"part_{n}") for n in range(len(shapes_of(self.form, self.tensor_shape, self.ranks, self.fixed)))]

    def fill(self, parts: Sequence[Tensor]) -> None:
        """Go on with these parts."""
        for n, part in enumerate(parts):
            setattr(self, f"part_{n}", nn.Parameter(part.detach().contiguous()))

    @torch.no_grad()
    def draw(self, deviation: float, rng: torch.Generator | None = None) -> None:
        """Fill the parts with random numbers, so that the weight has this standard deviation."""
        each = spread(self.form, self.tensor_shape, self.ranks, deviation, self.fixed)
        for part in self.parts:
            part.copy_(each * torch.randn(part.shape, generator=rng))

    def nonzeros(self) -> int:
        """How many entries of the parts are not zero; on the meta device, how many there can be."""
        return sum(part.numel() if part.is_meta else int(torch.count_nonzero(part)) for part in self.parts)


class TensorMatrix(TensorStored):
    """A matrix [out, in], padded and folded into a tensor whose way n runs over part n of the rows and of the columns.

    Row i has the digits i_1, ..., i_N in the mixed base `rows`, the first the most significant, and column j those in
    `columns`; the tensor's index in way n is i_n · columns[n] + j_n.
    """

    def __init__(
        self,
        out_features: int,
        in_features: int,
        *,
        form: Form,
        ranks: Sequence[int],
        rows: Sequence[int],
        columns: Sequence[int],
        bias: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ):
        super().__init__()
        self.out_features, self.in_features = out_features, in_features
        self.rows, self.columns = tuple(rows), tuple(columns)
        shape = [row * column for row, column in zip(rows, columns, strict=True)]
        self.hold(form, shape, ranks, dtype, device)
        self.bias = nn.Parameter(torch.empty(out_features, dtype=dtype, device=device)) if bias else None

    def pairs(self) -> list[str]:
        """The letters of each way: of its part of the rows, then of the columns."""
        return [row + column for row, column in zip("abcdefgh", "ijklmnop", strict=False)][: len(self.rows)]

    def unfolded(self) -> list[Tensor]:
        """The parts with each way as two dimensions, for rows and columns."""
        found = []
        for n, part in enumerate(self.parts):
            way = n - (self.form == "tucker")
            place = int(self.form == "tt")
            found.append(part if way < 0 else part.unflatten(place, (self.rows[way], self.columns[way])))
        return found

    def dense(self) -> Tensor:
        """The weight [out, in]."""
        ways = self.pairs()
        out = "".join(way[0] for way in ways) + "".join(way[1] for way in ways)
        whole = contract(terms(self.form, ways), self.unfolded(), out).reshape(prod(self.rows), prod(self.columns))
        return whole[: self.out_features, : self.in_features]

    def settings(self) -> dict[str, Any]:
        """What makes such a layer beside its sizes, as a JSON object."""
        return {"form": self.form, "ranks": list(self.ranks), "rows": list(self.rows), "columns": list(self.columns)}


def as_tensor(weight: Tensor, rows: Sequence[int], columns: Sequence[int]) -> Tensor:
    """A matrix [out, in], padded with zeros, as the tensor of `TensorMatrix`."""
    ways = len(rows)
    padded = nn.functional.pad(weight, (0, prod(columns) - weight.shape[1], 0, prod(rows) - weight.shape[0]))
    apart = padded.reshape(*rows, *columns).permute([n for way in range(ways) for n in (way, ways + way)])
    return apart.reshape([row * column for row, column in zip(rows, columns, strict=True)])

"""Store convolutions and embeddings as the parts of a tensor: CP, Tucker or tensor trains.

Kossaifi et al. 2023, arXiv:2310.00120 (factorised parameters). Kernels as CP: Lebedev et al. 2014, arXiv:1412.6553; as Tucker with
the channels alone: Kim et al. 2015, arXiv:1511.06530. Tables as trains: Hrinchuk et al. 2019, arXiv:1901.10787; matrices: Novikov
et al. 2015, arXiv:1509.06569. Parts come from alternating least squares (CP), HOSVD and HOOI (Tucker), and sequential singular
value decompositions (TT).
Differs: in CP and Tucker a kernel's sides are one way. Ranks never exceed the share. A table or matrix is folded into `parts` ways of a
part of its rows and one of its columns each, padded where they do not divide. Weights that would not shrink are left, and noted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import nn

from modelwright.blocks import _tensor, tensor_conv
from modelwright.blocks.tensor_conv import TensorConv
from modelwright.blocks.tensor_linear import TensorLinear
from modelwright.core.method import TensorMethod
from modelwright.core.settings import count, fraction
from modelwright.maths.tensor_factors import Form, decomposed, folded, ranks_for, size_of

MOST = 8192  # ranks of CP, whose squares are held in float64


@dataclass(frozen=True, kw_only=True)
class Tensor(TensorMethod):
    """Replace kernels and tables by parts of a tensor that are contracted at use; needs no data. Train afterwards."""

    status: ClassVar[str] = "checked"
    sites: ClassVar[tuple[str, ...]] = ("conv", "embed")
    whole: ClassVar[bool] = True
    leaves: ClassVar[frozenset[str]] = frozenset({"low-rank"})
    drops: ClassVar[frozenset[str]] = frozenset({"sparse"})
    holds: ClassVar[float] = 12  # in float64: the tensor, its unfolding, the products beside a factor
    solves: ClassVar[bool] = True
    neutral = dict(keep=1.0)
    small = dict(where="attn", iterations=3)

    form: Form = "cp"  # cp: one rank for all, nearest in small weights; tucker: a core between factors; tt: for large tables
    keep: float = fraction(0.5, low=1e-3)  # of each weight's parameters, in all parts together; 1 leaves it as it is
    parts: int = count(3, low=2, high=8)  # ways into which tables and matrices are folded
    iterations: int = count(50)  # of alternating least squares (cp) and HOOI (tucker), at most
    store: Literal["factors", "dense"] = "factors"  # dense: multiply them out again; saves nothing, loads anywhere

    def gained(self) -> frozenset[str]:
        return self.leaves if self.store == "factors" and self.keep != 1 else frozenset()

    def lost(self) -> frozenset[str]:
        return frozenset() if self.keep == 1 else self.drops

    def folding(self, shape: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The parts of the rows and of the columns of a matrix of this shape."""
        return folded(shape[0], self.parts), folded(shape[1], self.parts)

    def sizes(self, shape: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """The shape of the tensor, the ways that have no factor, and the ranks, for a weight of this shape."""
        if len(shape) > 2:
            whole, fixed = tensor_conv.tensor_shape(shape, self.form), tensor_conv.fixed_ways(self.form)
        else:
            whole, fixed = tuple(row * column for row, column in zip(*self.folding(shape), strict=True)), ()
        entries = torch.Size(shape).numel()
        return whole, fixed, ranks_for(self.form, whole, self.keep * entries / torch.Size(whole).numel(), fixed)

    def smaller(self, shape: Sequence[int]) -> bool:
        """Whether the parts are smaller than a weight of this shape."""
        whole, fixed, ranks = self.sizes(shape)
        return self.keep < 1 and size_of(self.form, whole, ranks, fixed) < torch.Size(shape).numel()

    def unfit(self, shape: tuple[int, ...]) -> str:
        rank = self.sizes(shape)[2][0]
        if self.form == "cp" and self.keep < 1 and rank > MOST:
            size = " × ".join(map(str, shape))
            return f"is {size}, so that cp would have the rank {rank:,}; at most {MOST:,} can be solved for. Use tt, or keep less"
        return ""

    def tensor(self, weight: torch.Tensor, rng: torch.Generator, notes: list[str]) -> torch.Tensor | nn.Module:
        shape = tuple(weight.shape)
        if not self.smaller(shape):
            if self.keep < 1:
                notes.append(f"{self.name()} left a weight of {list(shape)}, which its smallest parts do not make smaller")
            return weight
        _, fixed, ranks = self.sizes(shape)
        kernel = len(shape) > 2
        found = tensor_conv.as_tensor(weight, self.form) if kernel else _tensor.as_tensor(weight, *self.folding(shape))
        made = decomposed(self.form, found, ranks, fixed=fixed, iterations=self.iterations, rng=rng)
        layer = self.layer(shape, ranks)
        layer.fill(made)
        return layer.dense() if self.store == "dense" else layer

    def layer(self, shape: tuple[int, ...], ranks: tuple[int, ...], dtype: torch.dtype | None = None) -> TensorConv | TensorLinear:
        """The layer for a weight of this shape, empty."""
        if len(shape) > 2:
            return TensorConv(shape[0], shape[1], kernel=shape[2:], form=self.form, ranks=ranks, dtype=dtype, device="meta")
        rows, columns = self.folding(shape)
        return TensorLinear(shape[0], shape[1], form=self.form, ranks=ranks, rows=rows, columns=columns, dtype=dtype, device="meta")

    def planned(self, weight: torch.Tensor) -> torch.Tensor | nn.Module:
        shape = tuple(weight.shape)
        if self.store == "dense" or not self.smaller(shape):
            return weight
        return self.layer(shape, self.sizes(shape)[2], weight.dtype)

"""Low rank: W ≈ B·A, the best fit of its rank under a metric S of the inputs. A method fills in the metric."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from modelwright.blocks.low_rank import LowRankLinear
from modelwright.core.method import SiteMethod
from modelwright.core.settings import count, fraction
from modelwright.core.statistics import Statistics
from modelwright.maths import low_rank


@dataclass(frozen=True, kw_only=True)
class Factoriser(SiteMethod):
    """Stores each chosen weight as two factors."""

    sites: ClassVar[tuple[str, ...]] = ("attn", "mlp", "experts", "linear")
    leaves: ClassVar[frozenset[str]] = frozenset({"low-rank"})
    drops: ClassVar[frozenset[str]] = frozenset({"sparse"})
    holds: ClassVar[float] = 10  # in float64: the weight, a copy that LAPACK overwrites, both factors, its working space
    solves: ClassVar[bool] = True

    keep: float = fraction(0.5, low=1e-3)  # of each matrix's parameters, in both factors together; 1 leaves it as it is
    rank: int | None = count(None)  # of the product; overrides keep
    multiple: int = count(1)  # ranks are rounded down to one of this, but never to 0, so that groups of the factors' weights divide
    store: Literal["factors", "dense"] = "factors"  # dense: multiply them out again; saves nothing, loads anywhere

    def gained(self) -> frozenset[str]:
        return self.leaves if self.store == "factors" and not self.idle() else frozenset()

    def lost(self) -> frozenset[str]:
        return frozenset() if self.idle() else self.drops

    def idle(self) -> bool:
        """Whether every matrix stays as it is."""
        return self.keep == 1 and self.rank is None

    def metric(self, statistics: Statistics) -> Tensor | None:
        """S by what is known of the inputs: None for 1, a diagonal [in], or a lower factor [in, in]."""
        return None

    def rank_of(self, shape: tuple[int, ...]) -> int | None:
        """The rank for a weight of this shape [out, in]; None to leave it alone: where two factors would be no smaller."""
        if self.idle():
            return None
        rank = self.rank or low_rank.rank_for(self.keep, *shape)
        rank = max(rank - rank % self.multiple, self.multiple)
        return rank if self.store == "dense" or rank * sum(shape) < shape[0] * shape[1] else None

    def unfit(self, shape: tuple[int, ...]) -> str:
        if len(shape) != 2:
            return f"has the shape {list(shape)}, and two factors are for matrices"
        if self.multiple > min(shape):
            return f"is {shape[0]} × {shape[1]}, and has no rank that is a multiple of {self.multiple}. Lower multiple"
        if self.rank and self.rank > min(shape):
            return f"is {shape[0]} × {shape[1]}, so its rank is at most {min(shape)}; asked for {self.rank}"
        return ""

    def factored(self, weight: Tensor, metric: Tensor | None, known: tuple[Tensor, Tensor] | None = None) -> Tensor | nn.Module:
        """The weight [out, in] at its rank, under the metric S; `known`: its factors under S at this rank or a higher one."""
        rank = self.rank_of(tuple(weight.shape))
        if rank is None:
            return weight
        b, a = known or low_rank.factor(weight.double(), rank, metric)
        b, a = b[:, :rank], a[:rank]
        if self.store == "dense":
            return (b.double() @ a.double()).to(weight.dtype)
        return LowRankLinear.from_factors(b.to(weight.dtype).contiguous(), a.to(weight.dtype).contiguous())

    def planned(self, weight: Tensor) -> Tensor | nn.Module:
        rank = self.rank_of(tuple(weight.shape))
        if rank is None or self.store == "dense":
            return weight
        return LowRankLinear(out_features=weight.shape[0], in_features=weight.shape[1], rank=rank, dtype=weight.dtype, device="meta")

    def promise(self) -> dict[str, Any]:
        return {}

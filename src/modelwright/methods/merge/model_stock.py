"""Go from the model towards the donors' mean, as far as they agree: Model Stock.

Jang, Yun, Han 2024, arXiv:2403.19522, section 4, equation 3: t = N cos θ / (1 + (N-1) cos θ), with the mean cosine between
the changes of N donors, tensor by tensor.
Differs: t is kept from 0 to 1: changes that point apart leave the model as it is, where the formula steps backwards and,
near cos θ = -1/(N-1), without bound.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from modelwright.maths import spherical
from modelwright.maths.slices import Entries, Sliced
from modelwright.methods.merge._mechanism import PointWise


@dataclass(frozen=True, kw_only=True)
class ModelStock(PointWise):
    """Average two donors or more with the model they come from: what they agree on counts, what is noise does not."""

    status: ClassVar[str] = "checked"
    carries: ClassVar[bool] = True
    base_apart: ClassVar[bool] = True
    takes: ClassVar[tuple[int, int | None]] = (2, None)

    by_row: bool = False  # each row of a matrix has a share of its own

    def tensor(self, weight: Entries, donors: list[Entries]) -> Sliced:
        return spherical.mean(donors, share, weight.dtype, base=weight, by_row=self.by_row)


def share(gram: Tensor) -> Tensor:
    """t/N for each of N changes [..., N], from their dot products [..., N, N]."""
    count = gram.shape[-1]
    cosines = spherical.cosines(gram)
    between = (cosines.sum((-2, -1)) - cosines.diagonal(dim1=-2, dim2=-1).sum(-1)) / (count * (count - 1))
    t = between.clamp(min=0).mul(count) / (1 + (count - 1) * between.clamp(min=0))
    return (t / count)[..., None].expand(gram.shape[:-1])

"""Choose the weights that go and refit those that stay together, as one least squares problem.

Meng, Behdin, Wang, Mazumder 2024, arXiv:2406.07831, algorithms 1 and 2: ADMM with a growing penalty finds the support, and
conjugate gradients on it the values.
Differs: the eigenvectors are found in float64, the steps are taken in float32; columns that no input reaches count by the
damping alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from modelwright.core.errors import SiteError
from modelwright.core.settings import count, number
from modelwright.core.statistics import Statistics
from modelwright.maths.alternating import alternate, on_support
from modelwright.methods.prune._mechanism import LayerPruner


@dataclass(frozen=True, kw_only=True)
class Alps(LayerPruner):
    """Zero `sparsity` of the weights, chosen and refitted together for the layer's output; slower than sparsegpt, and closer."""

    status: ClassVar[str] = "checked"
    gathers: ClassVar[tuple[str, ...]] = ("moment",)
    solves: ClassVar[bool] = True
    holds: ClassVar[float] = 8
    neutral = dict(sparsity=0.0)
    small = dict(iterations=9)

    damp: float = number(0.01, low=0)  # added to the moment's diagonal, as a share of its mean
    penalty: float = number(0.1, low=1e-6)  # with which weights and their sparse copy are held together at first
    iterations: int = count(300, low=1)  # of ADMM, at most
    refits: int = count(10, low=0)  # steps of conjugate gradients on the support

    def prune(self, weight: Tensor, statistics: Statistics) -> Tensor:
        if not self.pattern and not self.sparsity:
            return weight
        moment = statistics.moment
        moment.diagonal().add_(self.damp * moment.diagonal().mean())
        scale = moment.diagonal().sqrt()
        scale[scale == 0] = 1
        moment = moment / (scale[:, None] * scale)
        moment.diagonal().fill_(1)
        if not moment.isfinite().all():
            raise SiteError("The second moment of a layer's inputs is not finite. Use a wider dtype, or leave the layer out with `skip`.")
        wanted = weight.float().T * scale[:, None]
        found = alternate(moment, wanted, self.kept, penalty=self.penalty, steps=self.iterations)
        fitted = on_support(moment, wanted, found, self.kept(found), self.refits)
        return (fitted / scale[:, None]).T.to(weight.dtype).contiguous()

    def kept(self, values: Tensor) -> Tensor:
        """Which entries of B [in, out] stay: the largest."""
        return ~self.removed(values.T.abs()).T

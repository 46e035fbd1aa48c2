"""Scale inputs so that the columns that matter most lose least, clip what is far out, and round.

Lin, Tang, Tang, Yang, Dang, Han 2023, arXiv:2306.00978, sections 3.2 and 3.3, as llm-awq does it: s = mean|x|^r over √(max s · min s),
with the r of a grid for which the outputs of the attention or MLP change least; s goes into the norm or matrix before. Then each
group's range is shrunk to where its own outputs change least, q and k left out, and v too where it is one matrix with them.
Differs: a group's error Δw (Σ x xᵀ) Δwᵀ is over all tokens, where llm-awq takes 512 of them. An `up` matrix is scaled only where a gate
multiplies it. Inputs of o are scaled where every head has its own v.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from modelwright.core.errors import SiteError
from modelwright.core.method import LayerMethod
from modelwright.core.settings import ByRole, count, fraction
from modelwright.core.statistics import Statistics
from modelwright.maths import rounding
from modelwright.maths.grids import nearest
from modelwright.methods.quantize._mechanism import Quantizer

LEAST = 1e-4  # of a scale
STEPS = 10  # in which a range shrinks


@dataclass(frozen=True, kw_only=True)
class Awq(Quantizer, LayerMethod):
    """Store weights in a few bits after scaling inputs that text shows to matter; adapts less to the text than GPTQ."""

    status: ClassVar[str] = "checked"
    gathers: ClassVar[tuple[str, ...]] = ("absolute", "moment")
    small = dict(group=32, points=4)
    fails = {"only_chosen_sites_change": "what makes the inputs of a chosen matrix is divided by what they are multiplied by"}

    symmetric: bool = False  # of integers; false adds zero points, and then modelwright is needed to load
    points: int = count(20)  # of the grid of exponents, from 0 on
    narrow: float = fraction(ByRole({"attn.{q,k,qkv}": 0.0, "*": 0.5}))  # the most that a group's range shrinks by, in ten steps

    def rescales(self) -> bool:
        return True

    def reruns(self) -> float:
        return 2 * self.points  # attentions for q, k and v and for o, MLPs for gate and up and for down

    def rescale(
        self, kind: str, readers: Sequence[tuple[Awq, Tensor]], statistics: Statistics, harm: Callable[[Sequence[Tensor]], float]
    ) -> Tensor | None:
        best, least = None, float("inf")
        for point in range(self.points):
            factor = statistics.absolute.pow(point / self.points).clamp(min=LEAST)
            factor = factor / (factor.max() * factor.min()).sqrt()
            scaled = [(own, (weight.float() * factor).to(weight.dtype)) for own, weight in readers]
            error = harm([nearest(weight, own.fitted(weight)).float() / factor for own, weight in scaled])
            if error < least:
                best, least = factor, error
        if best is None:
            raise SiteError(f"{self.name()}: what a block gives is NaN or infinite on the text. Use a wider dtype, or other text.")
        return best

    def layer(self, weight: Tensor, statistics: Statistics) -> nn.Module:
        weight = self.clipped(weight, statistics.moment) if self.narrow else weight
        grid = self.fitted(weight)
        return self.stored(grid, grid.encode(weight), weight)

    def clipped(self, weight: Tensor, moment: Tensor) -> Tensor:
        """Each group's weights between the bounds at which its outputs change least; moment [in, in]."""
        width = self.group_of(weight.shape[1]) or weight.shape[1]
        starts = range(0, weight.shape[1], width)
        own = torch.stack([moment[start : start + width, start : start + width] for start in starts])  # [groups, width, width]
        return torch.cat([self._clipped(part, own) for part in weight.split(rounding.ROWS)])

    def _clipped(self, weight: Tensor, own: Tensor) -> Tensor:
        """Some rows, with the moments of each group's inputs [groups, width, width]."""
        grouped = weight.float().view(len(weight), len(own), -1)
        largest = grouped.abs().amax(-1, keepdim=True)
        best, least = largest, torch.full_like(largest, torch.inf)
        for step in range(STEPS):
            bound = largest * (1 - self.narrow * step / STEPS)
            tried = grouped.clamp(-bound, bound).view(weight.shape).to(weight.dtype)
            apart = (nearest(tried, self.fitted(tried)).float() - weight.float()).view(grouped.shape)
            error = torch.einsum("ogi,gij,ogj->og", apart, own, apart)[..., None]
            best, least = torch.where(error < least, bound, best), torch.minimum(error, least)
        return grouped.clamp(-best, best).view(weight.shape).to(weight.dtype)

"""Train a low-rank update and a few single entries of each matrix, those that low rank leaves out of the weight: the adapter of DSEE.

Chen, Chen, Chen, Awadallah, Wang, Cheng 2021, arXiv:2111.00160, sections 3.1 and 3.2: ΔW = α/r · (B A + S₂). S₂ has values at N fixed
positions Ω: the N largest entries of what the greedy decomposition W ≈ P Q + S leaves of W to S. What the paper does next, zeroing weights
of W by the update and training it on, is `prune.dsee` or `prune.dsee_heads`, and `train`.
Differs: B and S₂ begin at zero, so that attaching changes no output; in the authors' code both are normal. Where S has fewer than N
entries, the largest of W - P Q below the threshold follow. The directions that Q gains are random mixes of the rows that are left.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from modelwright.blocks.reparametrised import Reparametrised, Scatter, low_rank
from modelwright.core.method import LayerAdapter
from modelwright.core.settings import count, number
from modelwright.maths import places
from modelwright.maths.decomposition import rest
from modelwright.methods.adapt._mechanism import beyond


@dataclass(frozen=True, kw_only=True)
class Dsee(LayerAdapter):
    """Add a low-rank update and few single entries to queries and values; pruning may then go by what they learnt."""

    status: ClassVar[str] = "checked"
    sized_by: ClassVar[tuple[str, ...]] = ("rank",)
    suffices: ClassVar[frozenset[str]] = frozenset({"packed"})
    neutral = {}  # B and S₂ start at zero
    sites: ClassVar[tuple[str, ...]] = ("attn.q", "attn.v", "attn.qkv")
    small = dict(rank=4)

    rank: int = count(16)  # rows of A, columns of B
    alpha: float = number(32.0, low=0)  # the update is scaled by alpha / rank
    entries: int = count(16)  # of each matrix, that train by themselves
    support: Literal["rest", "random"] = "rest"  # which entries: the largest that low rank leaves over, or any
    rounds: int = count(100, unit="rounds")  # in which the product of the decomposition gains 5 directions
    threshold: float = number(0.01, low=0)  # from which on an entry is left to the sparse part

    def unfit(self, shape: tuple[int, ...]) -> str:
        few = f"has {math.prod(shape)} weights, and {self.entries} entries were to train. Give fewer entries"
        return few if self.entries > math.prod(shape) else beyond(self.rank, shape)

    def part(self, weight: Tensor, bias: Tensor | None) -> Reparametrised:
        (rows, columns), scale = weight.shape, self.alpha / self.rank
        if self.support == "random" or weight.is_meta:
            at = places.drawn(weight.numel(), self.entries, weight)
        else:
            left = rest(weight, self.rounds, threshold=self.threshold).abs().flatten()
            at = places.largest(lambda part: left[part], len(left), self.entries).sort().values
        scatter = Scatter((rows, columns), at, nn.Parameter(torch.zeros(self.entries)), scale=scale)
        return Reparametrised(low_rank(rows, columns, self.rank, scale), scatter=scatter)

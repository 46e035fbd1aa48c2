"""Train the singular values of each frozen matrix: SVFit.

Sun, Wei, Wu, Lu, Wang, Chen 2024, arXiv:2409.05926, section 3.2: W = U Σ Vᵀ, of which U_r and V_r are held and σ trains. What is added
to W is U_r (C - Σ_r) V_rᵀ, which is nothing at first. With `band` above 0 entries of C beside the diagonal train too; with all of them it
is the matrix between held factors of LoRA-XS (arXiv:2405.17604).
Differs: C - Σ_r trains, which begins at 0, and not σ itself; both give the same steps, and W is not stored a second time. All matrices
of the blocks bear it without `where`; the authors adapt queries and values.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from modelwright.blocks.reparametrised import Band, Product, Reparametrised
from modelwright.core.method import LayerAdapter
from modelwright.core.settings import count
from modelwright.methods.adapt._mechanism import within


@dataclass(frozen=True, kw_only=True)
class Svfit(LayerAdapter):
    """Train one number for each direction of a matrix, the fewest of all that work on whole matrices; folds into the weight."""

    status: ClassVar[str] = "checked"
    sized_by: ClassVar[tuple[str, ...]] = ("rank",)
    suffices: ClassVar[frozenset[str]] = frozenset({"packed"})
    neutral = {}  # the change of the singular values starts at zero

    rank: int | None = count(None)  # singular values that train, the largest first; by default all
    band: int | None = count(0, low=0)  # diagonals of C on each side of the main one that train too; null for all
    relative: bool = False  # train the change as a share of the singular values (σ_i σ_j)^½, so that one learning rate suits all

    def otherwise(self, shape: tuple[int, ...]) -> str:
        return within(self.rank, shape)[1]

    def part(self, weight: Tensor, bias: Tensor | None) -> Reparametrised:
        rank = within(self.rank, weight.shape)[0]
        left, values, right = torch.linalg.svd(weight.float(), full_matrices=False)
        up, down = left[:, :rank], right[:rank]
        if self.relative:
            up, down = up * values[:rank].sqrt(), down * values[:rank, None].sqrt()
        core: nn.Parameter | Band
        if self.band == 0 or self.band is None:
            core = nn.Parameter(torch.zeros((rank,) if self.band == 0 else (rank, rank)))
        else:
            core = Band(rank, self.band)
        return Reparametrised(Product(up.contiguous(), down.contiguous(), core))

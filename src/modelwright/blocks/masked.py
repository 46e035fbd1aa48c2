"""A weight with a low-rank update, of whose entries those with the lowest scores are left out, while both train."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from modelwright.blocks._part import Dense, Layer, Part
from modelwright.blocks.reparametrised import take
from modelwright.maths.masks import lowest


class Masked(Part):
    """mask ⊙ W_t with W_t = W + β U V; the mask leaves out the `absent` entries with the lowest S = |W_t| + α₁ A B + α₂ (R 1ᵀ + 1 C).

    U [out, r₁] and A [out, r₂] are normal numbers, V [r₁, in], B [r₂, in], R [out] and C [in] are 0, so that S is |W| at first. In training
    the gradient of the mask is taken for that of S. The mask is found anew when what S is made of has changed. sparsity: what is to go, of
    the `size` entries, in the end.
    """

    absent: Tensor

    selectable = True

    def __init__(self, rows: int, columns: int, rank: int, score_rank: int, scales: tuple[float, float, float], sparsity: float):
        super().__init__()
        self.sparsity, self.size = sparsity, rows * columns
        self.up, self.down = nn.Parameter(torch.randn(rows, rank)), nn.Parameter(torch.zeros(rank, columns))
        self.score_up, self.score_down = nn.Parameter(torch.randn(rows, score_rank)), nn.Parameter(torch.zeros(score_rank, columns))
        self.score_rows, self.score_columns = nn.Parameter(torch.zeros(rows)), nn.Parameter(torch.zeros(columns))
        self.register_buffer("absent", torch.zeros((), dtype=torch.int64))
        self.scales = scales  # β, α₁, α₂
        self._found: tuple[tuple[tuple[int, int], ...], Tensor] | None = None

    def whole(self, weight: Tensor) -> Tensor:
        """W_t [out, in]."""
        return weight.to(self.up.dtype) + self.scales[0] * (self.up @ self.down)

    def scores(self, whole: Tensor) -> Tensor:
        """S [out, in]."""
        outer = self.score_rows[:, None] + self.score_columns
        return whole.abs() + self.scales[1] * (self.score_up @ self.score_down) + self.scales[2] * outer

    def mask(self, scores: Tensor, weight: Tensor) -> Tensor:
        """1 where an entry stays, and 0 elsewhere, [out, in]; weight: of which the scores are."""
        state = tuple((value.data_ptr(), value._version) for value in (*self.parameters(), self.absent, weight))
        if self._found is None or self._found[0] != state:
            share = (int(self.absent) + 0.5) / scores.numel()  # half an entry more, so that rounding takes none off
            self._found = state, ~lowest(scores.detach(), share)
        return self._found[1].to(scores.dtype)

    def effective(self, weight: Tensor) -> Tensor:
        """mask ⊙ W_t [out, in]."""
        whole = self.whole(weight)
        scores = self.scores(whole)
        mask = self.mask(scores, weight)
        return whole * (mask + self.training * (scores - scores.detach()))

    def select(self, dim: int, index: Tensor) -> None:
        before = len(self.score_columns if dim else self.score_rows)
        for name in ("down", "score_down") if dim else ("up", "score_up"):
            take(self, name, dim, index)
        take(self, "score_columns" if dim else "score_rows", 0, index)
        self.size = self.size // before * len(index)
        self.absent = self.absent * len(index) // before

    def forward(self, x: Tensor, layer: Layer) -> Tensor:
        weight, bias = layer.dense()
        return layer.given(x, self.effective(weight), bias)

    @torch.no_grad()
    def merged(self, weight: Tensor, bias: Tensor | None) -> Dense:
        return self.effective(weight).to(weight.dtype), bias

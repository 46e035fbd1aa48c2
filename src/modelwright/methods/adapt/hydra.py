"""Train two low-rank updates of each frozen matrix, one on its inputs and one on its outputs: Hydra.

Kim, Lee, Kim, Park, Choi, Yoon 2023, arXiv:2309.06922, section 3.3: y = f + s B_p A_p x + s B_s A_s f with f = W x + b. Both are
linear, and go into the weight: W' = W + s (B_p A_p + B_s A_s W), b' = b + s B_s A_s b.
Differs: the updates have no biases, as in the authors' code for text; that for images has some. All matrices of the blocks bear
them without `where`; the authors adapt the second matrix of the MLP, and for images the attention's output too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from modelwright.blocks.reparametrised import Reparametrised, low_rank
from modelwright.core.method import LayerAdapter
from modelwright.core.settings import count, number
from modelwright.methods.adapt._mechanism import beyond


@dataclass(frozen=True, kw_only=True)
class Hydra(LayerAdapter):
    """Change what a matrix is given and what it gives, both by few numbers; as cheap as LoRA, and folds into the weight."""

    status: ClassVar[str] = "checked"
    sized_by: ClassVar[tuple[str, ...]] = ("parallel", "sequential")
    suffices: ClassVar[frozenset[str]] = frozenset({"packed"})
    neutral = {}  # both B start at zero

    parallel: int = count(4, low=0)  # the rank of the update on the inputs; 0 for none
    sequential: int = count(4, low=0)  # the rank of the update on the outputs; 0 for none
    scale: float = number(1.0)  # s, of both

    def problems(self) -> list[str]:
        return ["parallel and sequential are both 0, so that nothing would train. Give one a rank."] * (
            self.parallel == self.sequential == 0
        )

    def unfit(self, shape: tuple[int, ...]) -> str:
        return beyond(self.parallel, shape) or beyond(self.sequential, (shape[0], shape[0]))

    def part(self, weight: Tensor, bias: Tensor | None) -> Reparametrised:
        rows, columns = weight.shape
        return Reparametrised(low_rank(rows, columns, self.parallel, self.scale), outer=low_rank(rows, rows, self.sequential, self.scale))

"""Train bottlenecks beside layers of which every pass uses a random part, and all parts in the end: MoSA.

Zhang, Zhang, Gao, Zhang, Shutova, Zhou, Zhang 2023, arXiv:2312.02923, section 3, and the authors' code: y = W x + scale · U φ(D x), and
chance divides the entries of U into `experts` groups of one size. In training a layer draws one in each pass: U is then 0 but for the
entries of its group, which alone learn; D is whole and shared (their hierarchical form). Used, U is the sum of all, divided by the number
of experts with `divide` (their merge "add"). Train it with `distill.agree`, whose second pass draws again: their objective.
Differs: U and D have no biases. The parts come together in use alone, and not also after each epoch. An expert stores its own group
alone, as all else of it stays at zero; so the adapter is as large as a plain one, and no decay shrinks what is not its own. Each
layer has a bottleneck, where the authors have one beside each MLP.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from modelwright.blocks.bottlenecks import Activation, Split
from modelwright.blocks.bottlenecks import Parallel as ParallelPart
from modelwright.core.settings import count, fraction, number
from modelwright.methods.adapt._mechanism import Bottlenecked


@dataclass(frozen=True, kw_only=True)
class Mosa(Bottlenecked):
    """Train narrow bottlenecks in random parts, which uses their numbers better; costs nothing more when used."""

    status: ClassVar[str] = "checked"
    sites: ClassVar[tuple[str, ...]] = ("mlp", "linear")

    experts: int = count(4)  # groups of U's entries
    inner: int = count(64)  # rows of D, columns of U
    activation: Activation = "relu"  # φ
    scale: float = number(0.1)  # of what the bottleneck gives
    dropout: float = fraction(0.1, high=0.99)  # of U's inputs, while training
    divide: bool = True  # the sum of the experts by their number, as the authors do

    def unfit(self, shape: tuple[int, ...]) -> str:
        entries = shape[0] * self.inner
        return f"leaves U {entries} entries, too few for {self.experts} experts. Give fewer" if entries < self.experts else ""

    def part(self, weight: Tensor, bias: Tensor | None) -> ParallelPart:
        (rows, columns), divisor = weight.shape, self.experts if self.divide else 1
        return ParallelPart(
            Split(rows, columns, self.inner, self.activation, self.experts, divisor=divisor, scale=self.scale, dropout=self.dropout)
        )

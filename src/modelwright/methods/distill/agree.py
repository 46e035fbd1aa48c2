"""Train on the next token, and so that two passes over the same text agree, each with random choices of its own.

Liang et al. 2021, arXiv:2106.14448 (R-Drop), equation 4, in the form of MoSA (Zhang et al. 2023, arXiv:2312.02923): CE(first) +
apart · (KL(first ‖ second) + KL(second ‖ first)) / 2. The passes differ by dropout, or by the experts that `adapt.mosa` draws.
Differs: as in MoSA the text's own tokens count in the first pass alone; R-Drop has both.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from modelwright.core.method import TrainMethod
from modelwright.core.settings import number
from modelwright.core.training import cross_entropy
from modelwright.maths.divergence import mixed_kl


@dataclass(frozen=True, kw_only=True)
class Agree(TrainMethod):
    """Train with dropout or random parts so that what chance does matters little; each step is two passes."""

    status: ClassVar[str] = "checked"
    suffices: ClassVar[frozenset[str]] = frozenset({"adapters"})
    small = dict(tokens=256, batch=2, length=16)

    apart: float = number(1.0, low=0)  # weight of the distance between both passes

    def loss(self, module: nn.Module, ids: Tensor, mask: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        first, second = module(input_ids=ids).logits, module(input_ids=ids).logits
        one, two = ((a[:, :-1], b[:, :-1], 0.0, 1.0, mask[:, 1:]) for a, b in ((first, second), (second, first)))
        text, distance = cross_entropy(first, ids, mask), (mixed_kl(*one) + mixed_kl(*two)) / 2
        return text + self.apart * distance, {"loss": text.detach(), "apart": distance.detach()}

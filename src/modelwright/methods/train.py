"""Train a model on text: next-token cross-entropy.

AdamW (Loshchilov, Hutter 2019, arXiv:1711.05101) with linear warmup and a cosine schedule (arXiv:1608.03983). As options
its states in 8 bits (COAT, Xi et al. 2024, arXiv:2410.19313), or muon (Jordan et al. 2024) for the matrices inside the blocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from modelwright.core.method import TrainMethod
from modelwright.core.training import next_token


@dataclass(frozen=True, kw_only=True)
class Train(TrainMethod):
    """Train all parameters that are not frozen on the next token; adapters alone, if there are any."""

    status: ClassVar[str] = "checked"
    suffices: ClassVar[frozenset[str]] = frozenset({"adapters"})
    small = dict(tokens=256, batch=2, length=16)

    def loss(self, module: nn.Module, ids: Tensor, mask: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return next_token(module, ids, mask)

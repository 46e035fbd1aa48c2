"""Train a compressed model to predict what its original predicts.

Hinton, Vinyals, Dean 2015, arXiv:1503.02531, section 2, with the skewed divergences of Ko et al. 2024,
arXiv:2402.03898, as an option.
Differs: no factor T² with a temperature, as in generalised knowledge distillation (arXiv:2306.13649); zeros of a
pruned model stay zero, and packed integers stay as they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from modelwright.core.method import TrainMethod
from modelwright.core.settings import fraction, number
from modelwright.core.training import cross_entropy, refuse_other_vocabulary
from modelwright.maths.divergence import mixed_kl


@dataclass(frozen=True, kw_only=True)
class Recover(TrainMethod):
    """Distil from `teacher` (often `$input`) on the text; zeros stay zero."""

    status: ClassVar[str] = "checked"
    wants: ClassVar[frozenset[str]] = frozenset()  # of a packed model, norms, biases and embeddings train
    small = dict(tokens=256, batch=2, length=16)

    direction: Literal["forward", "reverse"] = "forward"  # KL(teacher ‖ student), or KL(student ‖ teacher)
    skew: float = fraction(0.0)  # weight of the first distribution in the mixture it is compared with
    temperature: float = number(1.0, low=1e-3)  # divides the logits of both
    text: float = fraction(0.0)  # weight of the text's own next tokens in the loss

    def loss(self, module: nn.Module, ids: Tensor, mask: Tensor, teacher: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
        with torch.no_grad():
            wanted = teacher(input_ids=ids).logits
        found = module(input_ids=ids).logits
        refuse_other_vocabulary(self.name(), wanted.shape[-1], found.shape[-1])
        first, second = (wanted, found) if self.direction == "forward" else (found, wanted)
        divergence = mixed_kl(first[:, :-1], second[:, :-1], self.skew, self.temperature, mask[:, 1:])
        if not self.text:
            return divergence, {"divergence": divergence.detach()}
        own = cross_entropy(found, ids, mask)
        total = (1 - self.text) * divergence + self.text * own
        return total, {"divergence": divergence.detach(), "text": own.detach()}

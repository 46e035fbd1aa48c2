"""Factor the matrices, then train the factors to do inside what the original does: PELA.

Guo, Cheng, Xu, Zhang, Kankanhalli, Yang 2024, arXiv:2310.10700, section 3. The matrices are those of `factor.svd`; then all
weights train on text · (cross-entropy of the next token) + features · (mean over blocks of the mean square of hs - ht)
+ logits · (mean square of the logits' difference) + near · (mean over matrices of (max|BA - W| - radius)²), with the teacher's
hidden states ht and weights W. The result is an ordinary smaller model for further training.
Differs: the last of the hidden states is the one after the final norm, as transformers gives it. What is no language model is
not trained here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from modelwright.blocks.low_rank import LowRankLinear
from modelwright.core.errors import ModelError
from modelwright.core.method import Places, TrainMethod
from modelwright.core.settings import fraction, number
from modelwright.core.training import cross_entropy, refuse_other_vocabulary
from modelwright.methods.factor.svd import Svd


@dataclass(frozen=True, kw_only=True)
class Pela(TrainMethod):
    """Replace matrices by two factors and train the model to keep the hidden states of `teacher` (often `$input`)."""

    status: ClassVar[str] = "checked"
    leaves: ClassVar[frozenset[str]] = frozenset({"low-rank"})
    drops: ClassVar[frozenset[str]] = frozenset({"sparse"})
    small = dict(tokens=256, batch=2, length=16)

    keep: float = fraction(0.5, low=1e-3)  # of each matrix's parameters, in both factors together
    where: Places = None  # roles to factor; by default the matrices of the blocks
    skip: Places = None  # roles to leave whole
    text: float = number(1.0, low=0)  # weight of the text's own next tokens in the loss
    features: float = number(1.0, low=0)  # weight of the distance from the teacher's hidden states
    logits: float = number(0.0, low=0)  # weight of the distance from the teacher's logits
    near: float = number(0.0, low=0)  # weight of the distance from the teacher's weights
    radius: float = number(1e-3, low=0)  # the distance of the farthest weight that costs nothing

    def problems(self) -> list[str]:
        none = not (self.text or self.features or self.logits or self.near)
        return ["text, features, logits and near are all 0, so nothing would be learnt. Give one a weight."] if none else []

    def first(self) -> Svd:
        return Svd(keep=self.keep, where=self.where, skip=self.skip)

    def loss(self, module: nn.Module, ids: Tensor, mask: Tensor, teacher: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
        with torch.no_grad():
            wanted = teacher(input_ids=ids, output_hidden_states=True)
        found = module(input_ids=ids, output_hidden_states=True)
        if [state.shape for state in found.hidden_states] != [state.shape for state in wanted.hidden_states]:
            raise ModelError(f"{self.name()}: the teacher has other blocks or another width than the model. Give the model's original.")
        refuse_other_vocabulary(self.name(), wanted.logits.shape[-1], found.logits.shape[-1])
        parts = {
            "text": self.text * cross_entropy(found.logits, ids, mask),
            "features": self.features * self.apart(found.hidden_states[1:], wanted.hidden_states[1:], mask),
            "logits": self.logits * self.apart([found.logits], [wanted.logits], mask),
        }
        if self.near:
            parts["near"] = self.near * self.moved(module, teacher)
        return torch.stack(list(parts.values())).sum(), {name: part.detach() for name, part in parts.items()}

    def apart(self, found: list[Tensor], wanted: list[Tensor], mask: Tensor) -> Tensor:
        """The mean over pairs of states [batch, length, width] of their mean square difference where `mask` [batch, length] is true."""
        return torch.stack([F.mse_loss(one[mask].float(), two[mask].float()) for one, two in zip(found, wanted, strict=True)]).mean()

    def moved(self, module: nn.Module, teacher: nn.Module) -> Tensor:
        """The mean over factored matrices of (max|BA - W| - radius)²."""
        penalties = []
        for path, layer in module.named_modules():
            if isinstance(layer, LowRankLinear):
                original = dict(teacher.named_parameters()).get(f"{path}.weight")
                if original is None:
                    raise ModelError(f"{self.name()}: near needs {path} of the teacher, which does not have it. Set near: 0.")
                weight = original.detach().T if layer.replaces == "Conv1D" else original.detach()
                penalties.append(((layer.dense() - weight).abs().amax() - self.radius).square())
        return torch.stack(penalties).mean() if penalties else next(module.parameters()).new_zeros(())

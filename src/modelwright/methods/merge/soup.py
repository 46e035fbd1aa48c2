"""Average only the donors that help: model soups.

Wortsman et al. 2022, arXiv:2203.05482, sections 2 and 3. uniform: all donors count alike. greedy: donors in the order of
their loss; each stays if the mean with it is no worse. learned: one weight for each donor, found by gradient descent on
the loss.
Differs: the loss is that of the next token on the calibration text; learned soups have one weight for each donor, summing
to one by softmax, and no temperature of the logits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

from modelwright.core.method import ModelMethod
from modelwright.core.model import Model, unwrapped
from modelwright.core.settings import count, number
from modelwright.methods.merge._objective import filled, nats, refuse_unlike


@dataclass(frozen=True, kw_only=True)
class Soup(ModelMethod):
    """Replace the model by the mean of those donors that lower the loss on the calibration text."""

    status: ClassVar[str] = "checked"
    causal: ClassVar[bool] = True
    drops: ClassVar[frozenset[str]] = frozenset({"sparse"})

    kind: Literal["greedy", "uniform", "learned"] = "greedy"  # which donors count, and how much
    iterations: int = count(50)  # of gradient descent, for a learned soup
    learning_rate: float = number(0.1, low=0)  # of the learned weights' logits

    def model(self, model: Model, donors: Sequence[Model], calibration: Sequence[Mapping[str, Tensor]], notes: list[str]) -> Model:
        module = unwrapped(model.module)
        refuse_unlike(model, donors)
        pots = [dict(unwrapped(donor.module).named_parameters()) for donor in donors]
        shares = self.shares(module, pots, calibration)
        filled(module, pots, shares)
        told = ", ".join(f"{donor.name} {share:.3f}" for donor, share in zip(donors, shares, strict=True))
        notes.append(f"{self.name()}: shares of the donors: {told}; {nats(module, calibration):.4f} nats on the calibration text")
        return model

    def shares(self, module: nn.Module, pots: list[dict[str, Any]], batches: Sequence[Mapping[str, Tensor]]) -> list[float]:
        """How much each donor counts; they sum to one."""
        if self.kind == "learned":
            return self.learned(module, pots, batches)
        if self.kind == "uniform":
            return [1 / len(pots)] * len(pots)
        with torch.no_grad():
            alone = [nats(filled(module, [pot], [1.0]), batches) for pot in pots]
            order = sorted(range(len(pots)), key=alone.__getitem__)
            chosen, best = order[:1], alone[order[0]]
            for number_ in order[1:]:
                tried = [*chosen, number_]
                loss = nats(filled(module, [pots[each] for each in tried], [1 / len(tried)] * len(tried)), batches)
                if loss <= best:
                    chosen, best = tried, loss
        return [(each in chosen) / len(chosen) for each in range(len(pots))]

    def learned(self, module: nn.Module, pots: list[dict[str, Any]], batches: Sequence[Mapping[str, Tensor]]) -> list[float]:
        """Gradient descent on the logits of the weights, from equal ones."""
        logits = torch.zeros(len(pots), requires_grad=True)
        optimizer = torch.optim.Adam([logits], lr=self.learning_rate)
        stacks = {name: torch.stack([pot[name].detach().float() for pot in pots]) for name in pots[0]}
        with torch.enable_grad():
            for turn in range(self.iterations):
                batch = batches[turn % len(batches)]
                mixed = {name: torch.tensordot(logits.softmax(0), stack, 1).to(pots[0][name].dtype) for name, stack in stacks.items()}
                out = functional_call(module, mixed, kwargs={**batch, "labels": batch["input_ids"], "use_cache": False})
                optimizer.zero_grad()
                out.loss.backward()
                optimizer.step()
        return logits.detach().softmax(0).tolist()

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
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

from modelwright.core.method import ModelMethod
from modelwright.core.model import Model, unwrapped
from modelwright.core.settings import count, number
from modelwright.core.together import same_tensors, set_average
from modelwright.methods.merge._objective import nats


@dataclass(frozen=True, kw_only=True)
class Soup(ModelMethod):
    """Replace the model by the mean of those donors that lower the loss on the calibration text."""

    status: ClassVar[str] = "checked"
    alike: ClassVar[bool] = True
    causal: ClassVar[bool] = True
    drops: ClassVar[frozenset[str]] = frozenset({"sparse"})

    kind: Literal["greedy", "uniform", "learned"] = "greedy"  # which donors count, and how much
    iterations: int = count(50)  # of gradient descent, for a learned soup
    learning_rate: float = number(0.1, low=0)  # of the learned weights' logits

    def model(self, model: Model, donors: Sequence[Model], calibration: Sequence[Mapping[str, Tensor]], notes: list[str]) -> Model:
        same_tensors(model, donors)
        shares = self.shares(model, donors, calibration)
        set_average(model, donors, shares)
        told = ", ".join(f"{donor.name} {share:.3f}" for donor, share in zip(donors, shares, strict=True))
        loss = nats(unwrapped(model.module), calibration)
        notes.append(f"{self.name()}: shares of the donors: {told}; {loss:.4f} nats on the calibration text")
        return model

    def shares(self, model: Model, donors: Sequence[Model], batches: Sequence[Mapping[str, Tensor]]) -> list[float]:
        """How much each donor counts; they sum to one."""
        if self.kind == "learned":
            return self.learned(unwrapped(model.module), [dict(unwrapped(donor.module).named_parameters()) for donor in donors], batches)
        if self.kind == "uniform":
            return [1 / len(donors)] * len(donors)

        def loss(tried: Sequence[int]) -> float:
            """Of the mean of these donors."""
            set_average(model, [donors[each] for each in tried], [1.0] * len(tried))
            return nats(unwrapped(model.module), batches)

        alone = [loss([each]) for each in range(len(donors))]
        order = sorted(range(len(donors)), key=alone.__getitem__)
        chosen, best = order[:1], alone[order[0]]
        for each in order[1:]:
            if (found := loss([*chosen, each])) <= best:
                chosen, best = [*chosen, each], found
        return [(each in chosen) / len(chosen) for each in range(len(donors))]

    def learned(self, module: nn.Module, pots: Sequence[Mapping[str, Tensor]], batches: Sequence[Mapping[str, Tensor]]) -> list[float]:
        """Gradient descent on the logits of the weights, from equal ones; of each donor, its parameters by name."""
        logits = torch.zeros(len(pots), requires_grad=True)
        optimizer = torch.optim.Adam([logits], lr=self.learning_rate)
        stacks = {name: torch.stack([pot[name].detach().float() for pot in pots]) for name in pots[0]}
        with torch.enable_grad():
            for turn in range(self.iterations):
                batch = batches[turn % len(batches)]
                mixed = {name: torch.tensordot(logits.softmax(0), stack, 1).to(pots[0][name].dtype) for name, stack in stacks.items()}
                ids = batch["input_ids"]
                labels = ids.masked_fill(batch.get("attention_mask", torch.ones_like(ids)) == 0, -100)  # pad tokens do not count
                out = functional_call(module, mixed, kwargs={**batch, "labels": labels, "use_cache": False})
                optimizer.zero_grad()
                out.loss.backward()
                optimizer.step()
        return logits.detach().softmax(0).tolist()

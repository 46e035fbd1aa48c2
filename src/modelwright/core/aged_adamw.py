"""AdamW in which every entry has an age of its own, and an entry that takes another's place begins with moments that it is given.

Ansell, Vulić, Sterz, Korhonen, Ponti 2024, arXiv:2401.16405 (SpIEL), section 3.1 and the authors' code: an entry of age a is corrected
for the bias of a steps. With all ages alike it is AdamW.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from modelwright.core.one_by_one import OneByOne


class AgedAdamW(OneByOne):
    """Adam with decoupled weight decay for entries that are replaced; of each, 12 bytes are stored."""

    def __init__(
        self, params: Iterable[Any], lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
        weight_decay: float = 1e-2,
    ) -> None:  # fmt: skip
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))

    def change(self, value: Tensor, group: dict[str, Any]) -> None:
        state, gradient = self._begun(value), value.grad.float()  # type: ignore[union-attr]
        first, second, age = state["first"], state["second"], state["age"]
        slow, slower = group["betas"]
        age += 1
        first.lerp_(gradient, 1 - slow)
        second.mul_(slower).addcmul_(gradient, gradient, value=1 - slower)
        size = (second / (1 - slower**age)).sqrt_().add_(group["eps"])
        value.mul_(1 - group["lr"] * group["weight_decay"])
        value.sub_((group["lr"] * (first / (1 - slow**age)) / size).to(value.dtype))

    @torch.no_grad()
    def replace(self, value: Tensor, slots: Tensor, mean: Tensor, square: Tensor, age: float) -> None:
        """Let other entries take these slots of a parameter, as if they had had so many steps.

        slots: positions [n] in the flattened parameter. mean, square: [n], of their gradients and of the squares of these, over the time
        in which they were watched. age: that time in steps; 0 to begin with nothing.
        """
        slow, slower = next(group["betas"] for group in self.param_groups if any(value is one for one in group["params"]))
        state = self._begun(value)
        state["first"].view(-1)[slots] = mean.float() * (1 - slow**age)
        state["second"].view(-1)[slots] = square.float() * (1 - slower**age)
        state["age"].view(-1)[slots] = float(age)

    def _begun(self, value: Tensor) -> dict[str, Any]:
        state = self.state[value]
        for name in () if state else ("first", "second", "age"):
            state[name] = torch.zeros(value.shape, device=value.device)
        return state

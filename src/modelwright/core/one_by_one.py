"""What our optimizers have in common: every parameter is changed by itself, and states come back in their own dtypes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


class OneByOne(torch.optim.Optimizer, ABC):
    """An optimizer that writes how one parameter changes."""

    @abstractmethod
    def change(self, value: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        """Change a parameter by its gradient, float32, in place."""

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Change every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for value in group["params"]:
                if value.grad is not None:
                    self.change(value, value.grad.float(), group)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back what `state_dict` gave: every tensor in its own dtype, where torch would give it the parameter's."""
        super().load_state_dict(state_dict)
        params = [value for group in self.param_groups for value in group["params"]]
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        for number, value in zip(numbers, params, strict=True):
            for key, held in state_dict["state"].get(number, {}).items():
                self.state[value][key] = held.to(value.device, copy=True) if isinstance(held, Tensor) else held


class AdamWOneByOne(OneByOne):
    """Adam with decoupled weight decay, whose moments are kept as the optimizer likes. Loshchilov, Hutter 2019, arXiv:1711.05101."""

    def __init__(
        self, params: Iterable[Any], lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
        weight_decay: float = 1e-2,
    ) -> None:  # fmt: skip
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))

    def move(self, value: Tensor, gradient: Tensor, first: Tensor, second: Tensor, age: int | Tensor, group: dict[str, Any]) -> None:
        """Bring both moments, shaped like the gradient, up to date in place, and change the parameter by them.

        age: steps that the moments are of, this one too: of all entries, or of each.
        """
        slow, slower = group["betas"]
        first.lerp_(gradient, 1 - slow)
        second.mul_(slower).addcmul_(gradient, gradient, value=1 - slower)
        step = (first / (1 - slow**age)) / ((second / (1 - slower**age)).sqrt() + group["eps"])
        value.mul_(1 - group["lr"] * group["weight_decay"])
        value.sub_((group["lr"] * step).view(value.shape).to(value.dtype))

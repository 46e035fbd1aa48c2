"""What our optimizers have in common: every parameter is changed by itself, and states come back in their own dtypes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class OneByOne(torch.optim.Optimizer, ABC):
    """An optimizer that writes how one parameter changes."""

    @abstractmethod
    def change(self, value: Tensor, group: dict[str, Any]) -> None:
        """Change a parameter that has a gradient in place."""

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
                    self.change(value, group)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back what `state_dict` gave: every tensor in its own dtype, where torch would give it the parameter's."""
        super().load_state_dict(state_dict)
        params = [value for group in self.param_groups for value in group["params"]]
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        for number, value in zip(numbers, params, strict=True):
            for key, held in state_dict["state"].get(number, {}).items():
                self.state[value][key] = held.to(value.device, copy=True) if isinstance(held, Tensor) else held

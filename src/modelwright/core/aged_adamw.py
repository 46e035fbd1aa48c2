"""AdamW in which every entry has an age of its own, and an entry that takes another's place begins with moments that it is given.

Ansell, Vulić, Sterz, Korhonen, Ponti 2024, arXiv:2401.16405 (SpIEL), section 3.1 and the authors' code: an entry of age a is corrected
for the bias of a steps. With all ages alike it is AdamW.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from modelwright.core.one_by_one import AdamWOneByOne


class AgedAdamW(AdamWOneByOne):
    """Adam with decoupled weight decay for entries that are replaced; of each, 12 bytes are stored."""

    def change(self, value: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self._begun(value)
        state["age"] += 1
        self.move(value, gradient, state["first"], state["second"], state["age"], group)

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

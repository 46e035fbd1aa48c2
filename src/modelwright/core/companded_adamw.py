"""AdamW whose two moments are stored in 8-bit floats, with a power and two scales for each 128 numbers.

Xi et al. 2024, arXiv:2410.19313 (COAT), section 3: both moments in E4M3, read and written at each step in float32.
Differs: what is 0 does not count in a group's range; powers are at most 32, and 1 where all sizes of a group are equal.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from modelwright.core.one_by_one import AdamWOneByOne
from modelwright.maths import companding
from modelwright.maths.companding import Companded

MOMENTS = ("first", "second")


class CompandedAdamW(AdamWOneByOne):
    """Adam with decoupled weight decay; of each element and moment 1 byte is stored, and 12 for each 128 of them."""

    def change(self, value: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state, gradient = self.state[value], gradient.flatten()
        first, second = (
            companding.decode(Companded(*(state[f"{moment}_{part}"] for part in Companded._fields)))
            if state
            else torch.zeros_like(gradient)
            for moment in MOMENTS
        )
        state["step"] = state.get("step", 0) + 1
        self.move(value, gradient, first, second, state["step"], group)
        for moment, found in zip(MOMENTS, (first, second), strict=True):
            state |= {f"{moment}_{part}": stored for part, stored in companding.encode(found)._asdict().items()}

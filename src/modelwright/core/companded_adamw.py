"""AdamW whose two moments are stored in 8-bit floats, with a power and two scales for each 128 numbers.

Xi et al. 2024, arXiv:2410.19313 (COAT), section 3: both moments in E4M3, read and written at each step in float32.
Differs: what is 0 does not count in a group's range; powers are at most 32, and 1 where all sizes of a group are equal.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from modelwright.core.one_by_one import OneByOne
from modelwright.maths import companding
from modelwright.maths.companding import Companded

MOMENTS = ("first", "second")


class CompandedAdamW(OneByOne):
    """Adam with decoupled weight decay; of each element and moment 1 byte is stored, and 12 for each 128 of them."""

    def __init__(
        self, params: Iterable[Any], lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
        weight_decay: float = 1e-2,
    ) -> None:  # fmt: skip
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))

    def change(self, value: Tensor, group: dict[str, Any]) -> None:
        state, gradient = self.state[value], value.grad.float().flatten()  # type: ignore[union-attr]
        first, second = (
            companding.decode(Companded(*(state[f"{moment}_{part}"] for part in Companded._fields)))
            if state
            else torch.zeros_like(gradient)
            for moment in MOMENTS
        )
        count = state["step"] = state.get("step", 0) + 1
        slow, slower = group["betas"]
        first.lerp_(gradient, 1 - slow)
        second.mul_(slower).addcmul_(gradient, gradient, value=1 - slower)
        step = (first / (1 - slow**count)) / ((second / (1 - slower**count)).sqrt() + group["eps"])
        value.mul_(1 - group["lr"] * group["weight_decay"])
        value.sub_((group["lr"] * step).view(value.shape).to(value.dtype))
        for moment, found in zip(MOMENTS, (first, second), strict=True):
            state |= {f"{moment}_{part}": stored for part, stored in companding.encode(found)._asdict().items()}

"""Estimates of what the loss loses with a weight, from its gradient."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

Effect = Literal["first", "second", "mix", "channel"]


def effects(effect: Effect, weight: Tensor, gradient: Tensor, fisher: Tensor) -> Tensor:
    """The effect of each weight, of the shape of all of them; `fisher` is the mean of the gradient's square over examples.

    "first": |w g|. "second": w F w. "mix": |w g - w F w / 2|. "channel": w g with its sign, to be summed over a channel.
    """
    first, second = weight * gradient, weight.square() * fisher
    return {"first": first.abs(), "second": second, "mix": (first - second / 2).abs(), "channel": first}[effect]

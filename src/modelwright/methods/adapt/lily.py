"""Train low-rank updates whose second factors are shared between layers and mixed for each input.

arXiv:2407.09946: a down map for each layer, a few up maps for all of them, weighed by a router; through peft.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from modelwright.core.settings import count, number
from modelwright.methods.adapt._mechanism import LowRank


@dataclass(frozen=True, kw_only=True)
class Lily(LowRank):
    """LoRA whose layers help each other; what it gives is no change of the weights."""

    status: ClassVar[str] = "checked"
    neutral = {}  # the up maps start at zero
    config = "LilyConfig"
    calls = dict(rank="r", stride="stride_A", shared="num_B", scale="scaling")

    stride: int = count(1)  # layers next to each other that share a down map
    shared: int = count(2)  # up maps that all layers share
    scale: float = number(1.0)  # of the update

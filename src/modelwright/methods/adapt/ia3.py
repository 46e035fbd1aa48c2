"""Train a scale for each number that attention's keys and values and the inner layer pass on.

Liu, Tam, Muqeeth, Mohta, Huang, Bansal, Raffel 2022, arXiv:2205.05638, section 3.3: (IA)³; through peft. Matrices on their way
into the stream scale what they are given, all others what they give.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from modelwright.methods.adapt._mechanism import StockAdapter


@dataclass(frozen=True, kw_only=True)
class Ia3(StockAdapter):
    """The fewest numbers of all adapters here, one for each channel; learns little, and forgets little."""

    status: ClassVar[str] = "checked"
    neutral = {}  # all scales start at one
    config = "IA3Config"
    sites: ClassVar[tuple[str, ...]] = ("attn.k", "attn.v", "mlp.down")

    def told(self, roles: Mapping[str, str]) -> dict[str, Any]:
        into = [path for path, role in roles.items() if role in ("mlp.down", "attn.o")]
        return {"feedforward_modules": into}

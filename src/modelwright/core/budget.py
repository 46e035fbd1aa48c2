"""The most bytes that weights may take, as a user writes it."""

from __future__ import annotations

import re
from dataclasses import dataclass

from .errors import PlanError


@dataclass(frozen=True)
class Budget:
    """The most bytes that weights may take."""

    bytes: int
    text: str

    @classmethod
    def parse(cls, text: str | int | float, original: int) -> Budget:
        """Read "40%", "300MB", "1.5GiB", "2x" (half the size) or a number of bytes.

        Raises:
            PlanError: not a budget, or one that asks for nothing smaller.
        """
        found = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*(%|x|[kKMGT]?i?B)?\s*", str(text))
        if not found:
            raise PlanError(f"A budget is written 40%, 300MB or 2x; got {text!r}.")
        value, unit = float(found[1]), found[2] or "B"
        if unit == "%":
            size = original * value / 100
        elif unit == "x":
            size = original / value if value else 0
        else:
            step = 1024 if "i" in unit else 1000
            size = value * step ** ("kMGT".index(unit[0].replace("K", "k")) + 1 if unit not in ("B",) else 0)
        if size < 1:
            raise PlanError(f"A budget of {text} leaves no byte. Ask for more.")
        return cls(int(size), str(text))

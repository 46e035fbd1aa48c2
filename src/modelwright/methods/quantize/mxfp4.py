"""Store weights as 4-bit floats of which 32 share a power of two: MXFP4.

OCP Microscaling Formats 1.0, section 5.3: levels 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives, ties to the even mantissa.
Differs: the power of two goes up from 1.75 times a power on, as compressed-tensors has it, where OCP rounds down; the error is less.
Where 32 does not divide a row, the group is the largest divisor that they share, or the whole row where that is below 16; such a model
needs modelwright to load.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from modelwright.core.settings import count
from modelwright.methods.quantize.rtn import Rtn


@dataclass(frozen=True, kw_only=True)
class Mxfp4(Rtn):
    """Store weights as 4-bit floats with a power of two for every 32: the open format of recent accelerators."""

    status: ClassVar[str] = "checked"
    small = {}

    grid: Literal["mxfp4"] = "mxfp4"  # the levels
    group: int = count(32, low=32, high=32, unit="weights")  # of a row that share a scale

"""Store weights as 4-bit floats of which 16 share an 8-bit float: NVFP4.

Nvidia 2025, as compressed-tensors stores it: levels 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives; a group's scale is its largest
size over 6 as an E4M3 float, times a factor for the whole matrix that brings the largest scale to 448.
Differs: q, k and v, or gate and up, have factors of their own; engines that fuse them may ask for one. Where 16 does not divide a
row, the group is the largest divisor that they share, or the whole row where that is below 16; such a model needs modelwright to load.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from modelwright.core.settings import count
from modelwright.methods.quantize.rtn import Rtn


@dataclass(frozen=True, kw_only=True)
class Nvfp4(Rtn):
    """Store weights as 4-bit floats with an 8-bit float for every 16; finer than MXFP4, half a bit more."""

    status: ClassVar[str] = "checked"
    small = {}

    grid: Literal["nvfp4"] = "nvfp4"  # the levels
    group: int = count(16, low=16, high=16, unit="weights")  # of a row that share a scale

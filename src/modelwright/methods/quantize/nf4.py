"""Store weights as 4-bit normal floats with 8-bit scales: NF4 with double quantisation.

Dettmers, Pagnoni, Holtzman, Zettlemoyer 2023, arXiv:2305.14314, section 3: 16 levels of equal probability under a normal
distribution, the largest size of each `group` as its scale, and the scales in 8 bits in their turn.
Differs: groups lie within rows, and one that does not divide a row is lowered to the largest divisor that they share; bitsandbytes
runs them over the flattened matrix, which is the same where a row is a multiple of the group. The scales' own 8 bits are those of
bitsandbytes' files, where the paper says FP8.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from modelwright.core.settings import count
from modelwright.methods.quantize.rtn import Rtn


@dataclass(frozen=True, kw_only=True)
class Nf4(Rtn):
    """Store weights in 4 bits with levels that fit a normal distribution; what QLoRA trains beside."""

    status: ClassVar[str] = "checked"

    grid: Literal["nf4"] = "nf4"  # the levels
    group: int = count(64, low=0, unit="weights")  # of a row that share a scale; 0 for the whole row
    nested: bool = True  # store the scales in 8 bits, with scales of their own

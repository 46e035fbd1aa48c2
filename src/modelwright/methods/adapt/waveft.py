"""Train a few wavelets of each matrix's update.

Bilican, Yılmaz, Tekalp, Cinbiş 2025, arXiv:2505.12532: ΔW = s · (inverse wavelet transform of a matrix that is 0 but at
`frequencies` random places); through peft.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from modelwright.core.settings import count, number
from modelwright.methods.adapt._mechanism import OfWaves


@dataclass(frozen=True, kw_only=True)
class Waveft(OfWaves):
    """As FourierFT, with waves that are short in place; any number of trained values for each matrix."""

    status: ClassVar[str] = "checked"
    config = "WaveFTConfig"

    frequencies: int = count(2592)  # wavelets that train, of each matrix
    scale: float = number(25.0)  # of the update

"""Train a few frequencies of each matrix's update.

Gao, Wang, Chen, Liu, Wu, Chen, Li 2024, arXiv:2405.03003: ΔW = s · Re(inverse Fourier transform of a matrix that is 0 but at
`frequencies` random places, the same in all layers); through peft.
Differs: the frequencies begin at zero, where the authors' code has normal numbers, which change the model at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from modelwright.core.settings import count, number
from modelwright.methods.adapt._mechanism import OfWaves


@dataclass(frozen=True, kw_only=True)
class Fourierft(OfWaves):
    """A thousand numbers for each matrix, whatever its size; the update has full rank."""

    status: ClassVar[str] = "checked"
    config = "FourierFTConfig"
    fixed = dict(init_weights=True)

    frequencies: int = count(1000)  # that train, of each matrix
    scale: float = number(150.0)  # of the update

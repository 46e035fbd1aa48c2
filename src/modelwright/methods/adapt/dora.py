"""Train a low-rank update of each matrix's direction and, apart from it, its rows' lengths.

Liu, Wang, Yin, Molchanov, Wang, Cheng, Chen 2024, arXiv:2402.09353, section 4: W' = m · (W + s B A) / ‖W + s B A‖, with the norm of
each row, and m its length at first; through peft, whose gradient holds the norm still, as section 4.3 says.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from modelwright.methods.adapt._mechanism import Lowered


@dataclass(frozen=True, kw_only=True)
class Dora(Lowered):
    """LoRA that turns and stretches weights apart, closer to full tuning at low ranks; each step costs more than LoRA's."""

    status: ClassVar[str] = "checked"
    fixed = dict(use_dora=True)

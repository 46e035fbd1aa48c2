"""Train a Kronecker product of a small matrix and a low-rank one beside each matrix: LoKr.

Edalati, Tahaei, Kobyzev, Nia, Clark, Rezagholizadeh 2022, arXiv:2212.10650; Yeh et al. 2023, arXiv:2309.14859, section 3.2:
ΔW = s C ⊗ (B A); through peft.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from modelwright.methods.adapt._mechanism import OfTwoProducts


@dataclass(frozen=True, kw_only=True)
class Lokr(OfTwoProducts):
    """Fewer numbers than LoRA for the same rank of the update."""

    status: ClassVar[str] = "checked"
    config = "LoKrConfig"

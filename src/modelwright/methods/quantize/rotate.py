"""Turn hidden states and values by Hadamard matrices, so that no channel stands out, before weights or inputs are rounded.

Ashkboos et al. 2024, arXiv:2404.00456 (QuaRot), stages 1a and 1c; Liu et al. 2024, arXiv:2405.16406 (SpinQuant), R1 and R2 without
learning. Norms' weights go into the matrices behind them. What reads the stream becomes W Q, what writes to it Qᵀ W; in each
head the rows of v and the columns of o are turned by one matrix of its width. The result is a plain model that computes the same.
Differs: no rotations at run time (R3 and R4). Where no Hadamard matrix of a size is known here, a random orthogonal one is
taken. A head tied to the embedding comes apart. Models whose norms subtract a mean are left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from modelwright.anatomy import anatomy_of
from modelwright.anatomy._rotation import fold_norms, rotate_stream, stream_of
from modelwright.anatomy.reorder import movable, turn
from modelwright.core.method import ModelMethod
from modelwright.core.model import Model, unwrapped
from modelwright.maths.rotations import spreading


@dataclass(frozen=True, kw_only=True)
class Rotate(ModelMethod):
    """Rewrite the model so that it computes the same with hidden states that are easier to round; a quantiser should follow."""

    status: ClassVar[str] = "checked"
    drops: ClassVar[frozenset[str]] = frozenset({"sparse"})
    fails = {"ties_survive": "the final norm goes into the head and not into the embedding"}

    values: bool = True  # turn what attentions read from values, head by head, too

    @torch.no_grad()
    def model(self, model: Model, rng: torch.Generator, notes: list[str]) -> Model:
        module = unwrapped(model.module)
        width, tied = stream_of(module).count, anatomy_of(module).tied(module)
        fold_norms(module)
        if tied and not anatomy_of(module).tied(module):
            notes.append(f"{self.name()}: the head was the embedding and is stored by itself now, because the final norm went into it")
        rotate_stream(module, spreading(width, rng))
        for where in movable(module).values() if self.values else ():
            if where.site.role == "attn.o":
                turn(module, where, spreading(where.inputs.shape[2], rng))
        return model

    def planned(self, module: Any, donors: int) -> Any:
        stream_of(module)
        fold_norms(module)
        return module

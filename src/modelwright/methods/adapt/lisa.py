"""Train all weights of a few blocks at a time, which are drawn anew every so many steps: LISA.

Pan, Liu, Diao, Pi, Zhang, Han, Zhang 2024, arXiv:2403.17919, algorithm 1, and the authors' code: before every `every`-th step, the first
too, `blocks` of all blocks are drawn, all sets as likely, and train; the others rest. What stands in no block (embeddings, the last norm,
the head) always trains. What an optimizer holds of weights that come to rest is let go, so that it never holds more than for what trains,
4 · 2 bytes for each weight with AdamW; a block that is drawn again begins anew, and one that stays drawn goes on.
Differs: what the optimizer holds is let go, which the paper supposes and the authors' callback leaves out. Zeros stay zero.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from modelwright.anatomy import anatomy_of
from modelwright.core.errors import ModelError
from modelwright.core.method import TrainMethod
from modelwright.core.settings import count, number
from modelwright.core.training import Training, Zeros, next_token


@dataclass(frozen=True, kw_only=True)
class Lisa(TrainMethod):
    """Train all parameters in the memory that training a few blocks takes."""

    status: ClassVar[str] = "checked"
    small = dict(tokens=256, batch=2, length=16, blocks=1, every=2)

    blocks: int = count(2, unit="blocks")  # that train at a time
    every: int = count(20, unit="steps")  # from one draw of blocks to the next
    learning_rate: float = number(5e-5, low=0)  # the highest

    def loss(self, module: nn.Module, ids: Tensor, mask: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return next_token(module, ids, mask)

    def course(self, module: nn.Module, settings: Training, notes: list[str]) -> Taking:
        return Taking(self, module, settings.seed)


class Taking(Zeros):
    """Blocks that take turns to train.

    blocks: of each block its parameters that are to be trained; one that several blocks share trains when one of them does.
    """

    def __init__(self, method: Lisa, module: nn.Module, seed: int):
        super().__init__(module.parameters())
        self.method, self.seed = method, seed
        paths = anatomy_of(module).stack_paths(module)
        rows = [block for path in paths for block in module.get_submodule(path).children()]
        self.blocks = [[value for value in block.parameters() if value.requires_grad] for block in rows]
        if method.blocks > len(self.blocks):
            raise ModelError(f"{method.name()}: {method.blocks} blocks were to train at a time; the model has {len(self.blocks)}.")

    def drawn(self, turn: int) -> list[int]:
        """The blocks of a turn, the same however often one asks."""
        return sorted(random.Random(f"{self.seed} {turn}").sample(range(len(self.blocks)), self.method.blocks))

    def apart(self, turn: int) -> Iterator[tuple[Tensor, bool]]:
        """Each parameter of the blocks, and whether it trains in a turn."""
        training = {id(value) for number in self.drawn(turn) for value in self.blocks[number]}
        yield from ((value, id(value) in training) for block in self.blocks for value in block)

    def begin(self, step: int) -> None:
        for value, trains in self.apart(step // self.method.every):
            value.requires_grad_(trains)
            for optimizer in self.optimizers if not trains else ():
                optimizer.state.pop(value, None)

    def leave(self) -> None:
        for block in self.blocks:
            for value in block:
                value.requires_grad_(True)

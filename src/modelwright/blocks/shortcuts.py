"""The way around each attention and MLP of a block, for a stream that has a basis of its own at each place."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from modelwright.anatomy import anatomy_of
from modelwright.anatomy._rotation import fold_norms, slice_stream
from modelwright.blocks._joining import Ways, joining
from modelwright.blocks._stored import Guest


class Shortcuts(Guest):
    """x ← S x + part(norm(x)) for each attention and MLP of the host, S from the basis before it to the one behind it.

    Ashkboos et al. 2024, arXiv:2401.15024, section 3.2. ways: of each part, the paths inside the host of its norm and its own.
    widths: of the stream before each part and behind the last, which alone may be wider than what is before it.
    Stored: turns.N.weight [after, before] for each part.
    """

    kind = "shortcuts"
    turns_stream: ClassVar[bool] = True

    def __init__(self, *, ways: Ways, widths: Sequence[int], dtype: torch.dtype | None = None, device: torch.device | str | None = None):
        super().__init__()
        self.ways, self.widths = [list(way) for way in ways], list(widths)
        sizes = itertools.pairwise(self.widths)
        self.turns = nn.ModuleList(nn.Linear(before, after, bias=False, dtype=dtype, device=device) for before, after in sizes)

    def around(self, *args: Any, **kwargs: Any) -> Any:
        """What enters the block [..., first width] → what leaves it [..., last width] first."""
        more: list[Tensor] = []  # channels that the host's own sum has no place for

        def give(number: int, x: Tensor, part: Tensor) -> Tensor:
            total = part + self.turns[number](x)
            if total.shape[-1] > x.shape[-1]:
                more.append(total[..., x.shape[-1] :])
            return total[..., : x.shape[-1]] - x

        with joining(self._host[0], self.ways, give):
            found = self.inner(*args, **kwargs)
        if not more:
            return found
        out = torch.cat([found[0] if isinstance(found, tuple) else found, *more], -1)
        return (out, *found[1:]) if isinstance(found, tuple) else out

    def describe(self) -> dict[str, Any]:
        """The kind, paths and widths, as a JSON object."""
        return {"kind": self.kind, "ways": self.ways, "widths": self.widths}


@torch.no_grad()
def turn_at_each_norm(module: Any, bases: Sequence[Tensor]) -> None:
    """Give the stream a basis of its own [width, kept] before each norm, with what stands between them in the blocks.

    Raises: SiteError, before anything changes, where blocks are laid out otherwise than as x + part(norm(x)).
    """
    anatomy, place, like = anatomy_of(module), 0, next(module.parameters())
    ways, stack = anatomy.ways(module), module.get_submodule(anatomy.blocks(module) or "")
    fold_norms(module)
    slice_stream(module, bases)
    for depth, own in ways.items():
        near = bases[place : place + len(own) + 1]
        part = Shortcuts(ways=own, widths=[basis.shape[1] for basis in near], dtype=like.dtype, device=like.device)
        for turn, (before, after) in zip(part.turns, itertools.pairwise(near), strict=True):
            turn.get_parameter("weight").copy_(after.T @ before)
        part.join(stack[depth], "shortcuts")
        place += len(own)

"""An update B C A whose rank grows, by borders around the square matrix C."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from modelwright.blocks.reparametrised import Reparametrised, Thin

DEVIATION = 0.02  # of the values that B and A begin with


class Pieces(Thin):
    """scale · B C A, made of pieces; the piece t brings a ranks to the R that there are with it.

    downs: A_t [a, in], below each other. ups: B_t [out, a], beside each other. rows [a, R] and columns [R, a] of C, the lower and the
    right border; where they meet both count. B and A of a piece are normal numbers, and C is 0, so that a piece changes nothing at first
    and yet has a gradient.
    """

    def __init__(self, rows: int, columns: int, rank: int, scale: float):
        super().__init__()
        self.sizes, self.scale = (rows, columns), scale
        self.begin([rank])

    def begin(self, ranks: list[int], like: Tensor | None = None) -> None:
        """Have pieces of these ranks, and no others."""
        self.downs, self.ups, self.rows, self.columns = (nn.ParameterList() for _ in range(4))
        for more in ranks:
            self.grow(more, like=like)

    @property
    def ranks(self) -> list[int]:
        """That each piece brings."""
        return [len(down) for down in self.downs]

    def grow(self, ranks: int, random: torch.Generator | None = None, like: Tensor | None = None) -> list[nn.Parameter]:
        """Add a piece, of the type of another tensor, and on its device; gives its parameters."""
        total = sum(self.ranks) + ranks
        drawn = [DEVIATION * torch.randn(shape, generator=random) for shape in ((ranks, self.sizes[1]), (self.sizes[0], ranks))]
        values = [*drawn, torch.zeros(ranks, total), torch.zeros(total, ranks)]
        new = [nn.Parameter(value if like is None else value.to(like)) for value in values]
        for pieces, value in zip((self.downs, self.ups, self.rows, self.columns), new, strict=True):
            pieces.append(value)
        return new

    @torch.no_grad()
    def select(self, dim: int, index: Tensor) -> None:
        pieces = self.downs if dim else self.ups
        for number, value in enumerate(pieces):
            pieces[number] = nn.Parameter(value.index_select(dim, index), value.requires_grad)
        self.sizes = (self.sizes[0], len(index)) if dim else (len(index), self.sizes[1])

    def core(self) -> Tensor:
        """C [R, R]."""
        total, seen = sum(self.ranks), 0
        core = self.rows[0].new_zeros(total, total)
        for row, column in zip(self.rows, self.columns, strict=True):
            past = row.shape[1]
            core = core + nn.functional.pad(row, (0, total - past, seen, total - past)) + nn.functional.pad(
                column, (seen, total - past, 0, total - past))  # fmt: skip
            seen = past
        return core

    def parts(self) -> tuple[Tensor, Tensor | float, Tensor]:
        return torch.cat(list(self.ups), 1), self.scale * self.core(), torch.cat(list(self.downs))


class Growing(Reparametrised):
    """A layer with an update of pieces beside its weight. reference: the rank that it would have if all grew alike."""

    update: Pieces

    def __init__(self, update: Pieces, reference: int):
        super().__init__(update)
        self.reference = reference

    def adjust(self, found: dict[str, tuple[int, ...]]) -> None:
        ranks = [found[name][0] for number in range(len(found)) if (name := f"update.downs.{number}") in found]
        if ranks and ranks != self.update.ranks:
            first = self.update.downs[0]
            self.update.begin(ranks, first)
            self.update.requires_grad_(first.requires_grad)

"""SM3: in the place of a second moment of every entry one number for each row and each column.

Anil, Gupta, Koren, Singer 2019, arXiv:1901.11150, algorithm SM3-II, without momentum. The least of an entry's numbers and the square
of its gradient are ν; the entry moves by g / √(ν + eps), and each number becomes the largest ν of its row or column.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from modelwright.core.one_by_one import OneByOne


class Sm3(OneByOne):
    """Adagrad's steps with memory for the rows and columns of a matrix alone.

    entries: of parameters that are a few entries [k] of a matrix, its shape (out, in) and their positions [k] in it, row after row, which
    may change between two steps: these have numbers for its rows and columns. Vectors have one for each entry.
    """

    def __init__(
        self, params: Iterable[Any], lr: float = 1e-3, eps: float = 1e-30, weight_decay: float = 0.0,
        entries: Mapping[Tensor, tuple[tuple[int, int], Tensor]] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(params, dict(lr=lr, eps=eps, weight_decay=weight_decay))
        self.entries = dict(entries or {})

    def change(self, value: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        numbers, square = self.numbers(value), gradient.square()
        if value in self.entries:
            (_, columns), places = self.entries[value]
            at = [(places // columns).long(), (places % columns).long()]
            bound = functools.reduce(torch.minimum, [held[where] for held, where in zip(numbers, at, strict=True)]) + square
            for held, where in zip(numbers, at, strict=True):
                held.scatter_reduce_(0, where, bound, "amax")
        else:
            along = [held.view([-1 if way == own else 1 for way in range(value.ndim)]) for own, held in enumerate(numbers)]
            bound = functools.reduce(torch.minimum, along) + square
            for own, held in enumerate(numbers):
                others = [way for way in range(value.ndim) if way != own]
                torch.maximum(held, bound.amax(others) if others else bound, out=held)
        value.mul_(1 - group["lr"] * group["weight_decay"])
        value.sub_((group["lr"] * gradient / (bound + group["eps"]).sqrt()).to(value.dtype))

    def numbers(self, value: Tensor) -> list[Tensor]:
        """A parameter's numbers, one tensor for each of its ways: of a matrix of its rows [out], of its columns [in]."""
        state, sizes = self.state[value], self.entries[value][0] if value in self.entries else value.shape
        for way, size in enumerate(() if state else sizes):
            state[f"along{way}"] = torch.zeros(size, device=value.device)
        return [state[f"along{way}"] for way in range(len(sizes))]

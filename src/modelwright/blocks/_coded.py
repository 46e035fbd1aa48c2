"""What layers of coded weights have in common."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from modelwright.blocks._stored import Stored
from modelwright.maths import coded_floats
from modelwright.maths.coded_floats import PARTS, SPLITS, CodedFloats
from modelwright.maths.prefix_codes import lanes_of


class CodedWeight(Stored):
    """Holds a matrix whose values come back bit by bit, made anew at each call.

    Stored: weight_codes uint8 [bytes], weight_bits int16 [lanes], weight_lengths uint8 [2^exponent bits], weight_signs uint8 and, but of
    bfloat16, weight_rest (see `maths.coded_floats.CodedFloats`).
    """

    lossless = True
    weight_codes: Tensor
    weight_bits: Tensor
    weight_lengths: Tensor
    weight_signs: Tensor
    weight_rest: Tensor | None
    stored: torch.dtype  # of the matrix

    def hold(self, parts: CodedFloats) -> None:
        """Take these parts."""
        for name, part in zip(PARTS, parts, strict=True):
            self.register_buffer(f"weight_{name}", part)

    def hold_empty(self, nbytes: int, dtype: str, device: torch.device | str | None) -> None:
        """Take unfilled parts, the codes of so many bytes."""
        self.stored = getattr(torch, dtype)
        split, count = SPLITS[self.stored], self.weights()
        self.hold(CodedFloats(
            torch.empty(nbytes, dtype=torch.uint8, device=device),
            torch.empty(lanes_of(count), dtype=torch.int16, device=device),
            torch.empty(1 << split.exponent, dtype=torch.uint8, device=device),
            torch.empty((count,) if split.upper == 7 else (split.upper + 1, -(-count // 8)), dtype=torch.uint8, device=device),
            None if split.rest is None else torch.empty(count, dtype=split.rest, device=device),
        ))  # fmt: skip

    def parts(self) -> CodedFloats:
        """The parts of the matrix."""
        return CodedFloats(*(getattr(self, f"weight_{name}") for name in PARTS))

    def values(self, blocks: list[int] | None = None) -> Tensor:
        """The stored entries in their order; with `blocks`, those of these blocks alone."""
        if self.weight_codes.is_meta:
            return torch.empty(self.weights(), dtype=self.stored, device="meta")
        return coded_floats.decode(self.parts(), self.stored, self.weights(), blocks)

    def describe_parts(self) -> dict[str, Any]:
        """What the description says of the parts."""
        return {"nbytes": len(self.weight_codes), "stored": str(self.stored).removeprefix("torch.")}

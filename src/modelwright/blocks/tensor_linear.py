"""A linear layer whose matrix is folded into a tensor and stored as its parts."""

from __future__ import annotations

from math import prod

from torch import Tensor, nn

from modelwright.blocks._stored import Stored
from modelwright.blocks._tensor import TensorMatrix
from modelwright.blocks.tensor_embedding import TensorEmbedding
from modelwright.maths.tensor_factors import contract, multiplications, sizes_of, terms


class TensorLinear(TensorMatrix):
    """y = W x + b, W [out, in] as in `TensorMatrix`, without W being made. Stored: part_0, part_1, ...; bias [out]."""

    kind = "tensor_linear"

    def forward(self, inputs: Tensor) -> Tensor:
        """inputs [..., in] → [..., out]."""
        letters, out = self.letters()
        padded = nn.functional.pad(inputs, (0, prod(self.columns) - self.in_features))
        found = contract(letters, [padded.reshape(-1, *self.columns), *self.unfolded()], out)
        found = found.reshape(*inputs.shape[:-1], prod(self.rows))[..., : self.out_features]
        return found if self.bias is None else found + self.bias

    def letters(self) -> tuple[list[str], str]:
        """The letters of the inputs and of the parts, and those of the outputs."""
        ways = self.pairs()
        columns, rows = "".join(way[1] for way in ways), "".join(way[0] for way in ways)
        return ["z" + columns, *terms(self.form, ways)], "z" + rows

    def work(self) -> int:
        """Multiplications for one input."""
        letters, out = self.letters()
        return multiplications(letters, {"z": 1} | sizes_of(letters[1:], self.unfolded()), out)

    def why_not(self, old: nn.Module) -> str:
        return "" if isinstance(old, nn.Embedding) else super().why_not(old)

    def standing_for(self, old: nn.Module) -> Stored:
        """The layer itself, or an embedding of its parts."""
        if not isinstance(old, nn.Embedding):
            return super().standing_for(old)
        layer = TensorEmbedding(
            self.out_features, self.in_features, form=self.form, ranks=self.ranks, rows=self.rows, columns=self.columns,
            multiplier=float(getattr(old, "embed_scale", 1.0)), device="meta",
        )  # fmt: skip
        layer.fill(self.parts)
        return layer.standing_for(old)

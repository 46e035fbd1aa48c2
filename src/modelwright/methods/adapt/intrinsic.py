"""Train few numbers from which the changes of all weights are made: intrinsic dimension, and SAID.

Li, Farkhoor, Liu, Yosinski 2018, arXiv:1804.08838, section 2: W = W₀ + P z with a fixed random P. Each weight has a P of its own, and all
share z, as in Aghajanyan, Zettlemoyer, Gupta 2020, arXiv:2012.13255, section 3, where SAID gives each layer a scalar: W = W₀ + λ P z, with
as many of the numbers for λ as there are layers. Heads that train whole, `modules_to_save` in peft, are outside of that count.
Differs: columns of a sparse P have exactly √n entries for n weights, one in each stretch, where the authors' code draws each by itself;
the Hadamard transform is scaled to be its own inverse, so that its gradient is exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn, ones

from modelwright.blocks.subspace import Coordinates, Subspace
from modelwright.core.errors import SettingError
from modelwright.core.method import LayerAdapter
from modelwright.core.settings import count
from modelwright.maths.projections import Form


@dataclass(frozen=True, kw_only=True)
class Intrinsic(LayerAdapter):
    """Train a given number of values in all, however large the model is; an adapter of some kilobytes that folds into the weight."""

    status: ClassVar[str] = "checked"
    sized_by: ClassVar[tuple[str, ...]] = ("dimension",)
    suffices: ClassVar[frozenset[str]] = frozenset({"packed"})
    neutral = {}  # z begins at zero
    small = dict(dimension=64)

    dimension: int = count(20000)  # numbers that train, in all
    form: Form = "fastfood"  # of P: dense, of normal numbers; sparse, of few ±1; or a product of fast transforms, without a matrix
    layer_scales: bool = True  # SAID: a scalar λ for each layer, taken from `dimension`

    def unfit(self, shape: tuple[int, ...]) -> str:
        most = shape[0] * shape[1]
        return f"has {most:,} entries, fewer than the dimension {self.dimension:,}. Give less" * (self.dimension > most)

    def shared(self, sizes: Sequence[tuple[int, int]]) -> Coordinates:
        rest = self.dimension - len(sizes) * self.layer_scales
        if rest < 1:
            raise SettingError(
                f"{self.name()}: of the dimension {self.dimension} nothing is left beside a scalar for each of {len(sizes)} layers. "
                "Give more, or layer_scales: false."
            )
        return Coordinates(rest)

    def part(self, weight: Tensor, bias: Tensor | None) -> Subspace:
        rows, columns = weight.shape
        return Subspace(self.form, (rows, columns), nn.Parameter(ones(())) if self.layer_scales else None, weight.is_meta)

"""Train bottlenecks after attentions and MLPs whose matrices are sums of Kronecker products: Compacter.

Karimi Mahabadi, Henderson, Ruder 2021, arXiv:2106.04647, section 4: each map is x H + b with H = Σ_t S_t ⊗ (u_t v_t); the n slow matrices
S_t [n, n] are shared by all maps of all layers, and u_t [k/n, p], v_t [p, d/n] are each map's own. A bottleneck is y + up(gelu(down(y)))
on what an attention or an MLP gives. Compacter++ is `where: mlp.down`; PHM adapters are `rank: 0, slow: each, terms: 12`. S begins at
10⁻⁴, which the gradients of u and v are multiplied by: train with Adam and a high learning rate (3e-3).
Differs: the norms that train too are copies that are saved with the adapter, so that the model's own stay.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor, nn

from modelwright.blocks.kronecker import KroneckerBottleneck, Slow
from modelwright.core.method import LayerAdapter
from modelwright.core.settings import count


@dataclass(frozen=True, kw_only=True)
class Compacter(LayerAdapter):
    """Train bottlenecks of very few numbers, and the norms; the fewest of all adapters that bend the stream."""

    status: ClassVar[str] = "checked"
    sized_by: ClassVar[tuple[str, ...]] = ("reduction",)
    suffices: ClassVar[frozenset[str]] = frozenset({"packed"})
    sites: ClassVar[tuple[str, ...]] = ("attn.o", "attn.cross_o", "mlp.down")
    small = dict(reduction=2)

    terms: int = count(4)  # n, Kronecker products in each sum; divides the width and the inner width
    reduction: int = count(32)  # the width over the inner width
    rank: int = count(1, low=0)  # p, of the fast matrices; 0 for dense ones
    slow: Literal["shared", "each"] = "shared"  # slow matrices are shared by all maps, or of each map
    norms: bool = True  # the model's norms train too

    def unfit(self, shape: tuple[int, ...]) -> str:
        inner = shape[0] // self.reduction
        if inner and shape[0] % self.terms == inner % self.terms == 0:
            return ""
        return (
            f"gives {shape[0]} channels, which reduction={self.reduction} makes {inner}; terms={self.terms} must divide both. "
            "Give another reduction, or fewer terms"
        )

    def whole(self) -> tuple[str, ...]:
        return ("norm",) if self.norms else ()

    def shared(self, sizes: Sequence[tuple[int, int]]) -> nn.Module:
        return Slow(self.terms) if self.slow == "shared" else nn.Module()

    def part(self, weight: Tensor, bias: Tensor | None) -> KroneckerBottleneck:
        return KroneckerBottleneck(len(weight), len(weight) // self.reduction, self.terms, self.rank, self.slow == "each")

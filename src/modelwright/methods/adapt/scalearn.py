"""Learn how much each of several trained adapters counts for a new task: ScaLearn and its smaller forms.

Frohmann et al. 2023, arXiv:2310.01217: h' = h + Σ_k ω_k ⊙ o_k, where o_k is what the
adapter of source task k gives, without the residual. ω is a number for each task and channel in each layer; with `uniform` for each task
(ScaLearnUniform), with `common` the same in all layers (ScaLearn++), with both ScaLearnUniform++. Nothing makes them sum to 1.
The adapter of the task itself is best among the sources. ω begins at 2 / tasks, within 0.001, and some of it is dropped while training:
0.3 for ω of channels, and the authors' 0 with `uniform`.
Differs: ω of channels in LoRA's place, instead of a bottleneck's, folds into the weight: W + Σ diag(ω_k) B_k A_k.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from modelwright.blocks.gated import Constant, Fixed, Gated, Scales
from modelwright.core.errors import SettingError
from modelwright.core.settings import fraction
from modelwright.methods.adapt._mechanism import OnTrained


@dataclass(frozen=True, kw_only=True)
class Scalearn(OnTrained):
    """Mix trained adapters by learnt coefficients; transfers to a task with few examples, and few numbers train."""

    status: ClassVar[str] = "checked"
    suffices: ClassVar[frozenset[str]] = frozenset({"packed"})

    uniform: bool = False  # one coefficient for all channels
    common: bool = False  # the same coefficients in all layers
    dropout: float = fraction(0.3, high=0.99)  # of coefficients, while training

    def shared(self, sizes: Sequence[tuple[int, int]]) -> nn.Module:
        widths = {rows for rows, _ in sizes}
        if self.common and not self.uniform and len(widths) > 1:
            shown = ", ".join(map(str, sorted(widths)))
            raise SettingError(f"{self.name()}: layers of {shown} channels cannot have common coefficients of channels. Add uniform: true.")
        return self.scales(widths.pop()) if self.common else nn.Module()

    def scales(self, width: int) -> Scales:
        """Coefficients for layers of so many channels."""
        return Scales(len(self.sources), 1 if self.uniform else width, dropout=self.dropout)

    def part(self, weight: Tensor, bias: Tensor | None) -> Gated:
        gate = Constant(None if self.common else self.scales(len(weight)))
        kind = Fixed if (self.activation, self.side) == ("none", "beside") else Gated
        return kind(self.held(weight), gate, after=self.side == "after")

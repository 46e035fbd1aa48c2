"""Fuse several LoRA adapters by gates that see what the layer and the adapters give: the gated fusion of AutoLoRA.

Li et al. 2025, arXiv:2508.02107: for outputs u of a layer and v_k of its LoRAs
g_k = σ(LN(u) ⊙ w_b + LN(v_k) ⊙ w_l + LN(u) ⊙ LN(v_k) ⊙ w_c + c), and y = u + Σ_k w_o ⊙ g_k ⊙ v_k. All w and c are shared by
the LoRAs, so that trained gates take others, and more or fewer: `exchange`. `blocks.lora_encoder` finds the LoRAs that a text asks for.
Differs: c begins at 3 and the other w at 0, so that all LoRAs count nearly whole; the authors' are random. The global LoRA that
steadies theirs is another adapter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from modelwright.blocks._part import dense_of
from modelwright.blocks.gated import Activated, Gated
from modelwright.methods.adapt._mechanism import OnTrained


@dataclass(frozen=True, kw_only=True)
class Autolora(OnTrained):
    """Learn gates that let several LoRAs work together, token by token; they serve LoRAs that they never saw."""

    status: ClassVar[str] = "checked"
    suffices: ClassVar[frozenset[str]] = frozenset({"packed"})

    def part(self, weight: Tensor, bias: Tensor | None) -> Gated:
        return Gated(self.held(weight), Activated(len(weight)), after=self.side == "after")


def exchange(model: Any, sources: Sequence[str], adapter: str = "default") -> None:
    """Let the trained gates of a model work on other adapters, from these folders; as many as are named."""
    from modelwright.core.tuners import Bearer

    config = model.peft_config[adapter]
    config.sources = tuple(sources)
    for path, layer in model.get_base_model().named_modules():
        if isinstance(layer, Bearer) and adapter in layer.parts:
            part: Any = layer.parts[adapter]
            method = config.method(path)
            part.sources = nn.ModuleList(method.held(dense_of(layer.get_base_layer())[0])).to(part.gate.out)
            method.fill(part, path)

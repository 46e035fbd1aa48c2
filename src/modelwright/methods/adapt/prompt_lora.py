"""Train low-rank updates whose every channel the prompt scales: the prompt-aware LoRA weight adapter of WavLLM.

Hu et al. 2024, arXiv:2404.00656: y = W x + (B A x) ⊙ ρ. The model sees the prompt alone, without its adapters; of its last hidden
states H come S = W₂ gelu(W₁ H), weights a = softmax(w · S + c) of the tokens, and ρ = clamp(relu(Σ a_n S_n), most). Run and
train inside `with blocks.gated.prompted(model, input_ids=...):`, which computes ρ once, also for many generated tokens. Outside
of it ρ is near 1, as in the authors' first stage, which is plain LoRA.
Differs: W₂'s bias begins at 1, so that no channel is dead, and tokens of padding do not count. Layers with fewer channels than H, such as
grouped keys and values, take the first of ρ.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from modelwright.blocks.gated import Gated, Prompt, Prompted
from modelwright.blocks.reparametrised import low_rank
from modelwright.core.method import LayerAdapter
from modelwright.core.settings import count, fraction, number
from modelwright.methods.adapt._mechanism import beyond


@dataclass(frozen=True, kw_only=True)
class PromptLora(LayerAdapter):
    """Train LoRA that works more or less, channel by channel, as the instruction asks; for models of many tasks."""

    status: ClassVar[str] = "checked"
    sized_by: ClassVar[tuple[str, ...]] = ("rank",)
    suffices: ClassVar[frozenset[str]] = frozenset({"packed"})
    neutral = {}  # B starts at zero
    sites: ClassVar[tuple[str, ...]] = ("attn",)

    rank: int = count(8)  # rows of A, columns of B
    dropout: float = fraction(0.1, high=0.99)  # of the update's inputs, while training
    most: float = number(3.0, low=0)  # no channel counts more

    def shared(self, sizes: Sequence[tuple[int, int]]) -> nn.Module:
        return Prompt(min(columns for _, columns in sizes), self.most)

    def unfit(self, shape: tuple[int, ...]) -> str:
        return beyond(self.rank, shape)

    def part(self, weight: Tensor, bias: Tensor | None) -> Gated:
        rows, columns = weight.shape
        update = low_rank(rows, columns, self.rank, dropout=self.dropout)
        assert update is not None
        return Gated((update,), Prompted())

"""Mixtures of experts: Mixtral, Qwen2-MoE, Qwen3-MoE and OLMoE.

In the module all experts of a block are one tensor [experts, out, in]; on disk each has its own matrices.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

from ._base import Anatomy, Units
from .llama import BLOCK, ENDS


class Moe(Anatomy):
    """Mixtral, Qwen2-MoE and Qwen3-MoE; an expert that sees every token counts as `mlp`."""

    name = "moe"
    types: ClassVar[tuple[str, ...]] = ("mixtral", "qwen2_moe", "qwen3_moe")
    roles = {
        "layers.N.mlp.experts.gate_up_proj": "experts.gate_up",
        "layers.N.mlp.experts.down_proj": "experts.down",
        "layers.N.mlp.experts.E.gate_proj": "experts.gate",
        "layers.N.mlp.experts.E.up_proj": "experts.up",
        "layers.N.mlp.experts.E.down_proj": "experts.down",
        "layers.N.block_sparse_moe.experts.E.w1": "experts.gate",
        "layers.N.block_sparse_moe.experts.E.w3": "experts.up",
        "layers.N.block_sparse_moe.experts.E.w2": "experts.down",
        "layers.N.mlp.gate": "router",
        "layers.N.block_sparse_moe.gate": "router",
        "layers.N.mlp.shared_expert.gate_proj": "mlp.gate",
        "layers.N.mlp.shared_expert.up_proj": "mlp.up",
        "layers.N.mlp.shared_expert.down_proj": "mlp.down",
        "layers.N.mlp.shared_expert_gate": "router.shared",
        **BLOCK,
        **ENDS,
    }

    def _mlp(self, module: Any) -> list[Units]:
        return [
            dataclasses.replace(units, size="shared_expert_intermediate_size") if units.scope.endswith(".shared_expert") else units
            for units in super()._mlp(module)
        ]

    def blocks_left(self, module: Any, stack: str, kept: list[int], before: list[Any]) -> None:
        """Say anew which blocks have a plain MLP: the config counts them by their place."""
        if hasattr(module.config, "mlp_only_layers"):
            plain = [new for new, n in enumerate(kept) if not hasattr(before[n].mlp, "experts")]
            module.config.mlp_only_layers, module.config.decoder_sparse_step = plain, 1


class Olmoe(Moe):
    """OLMoE: as OLMo 2, its query norm runs over all heads."""

    name = "olmoe"
    types = ("olmoe",)
    why_not = {"heads": "their query norm runs over all heads together, so the heads that stay would change"}

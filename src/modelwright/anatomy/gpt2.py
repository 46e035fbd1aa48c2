"""GPT-2: weights stored [in, out], query, key and value in one."""

from __future__ import annotations

from typing import Any

from modelwright.core.errors import PlanError

from ._base import Anatomy
from .phi import LAYER_NORM


class Gpt2(Anatomy):
    """GPT-2 and models of its type."""

    name = "gpt2"
    types = ("gpt2",)
    roles = {
        "h.N.attn.c_attn": "attn.qkv",
        "h.N.attn.c_proj": "attn.o",
        "h.N.mlp.c_fc": "mlp.up",
        "h.N.mlp.c_proj": "mlp.down",
        "h.N.ln_*": "norm",
        "ln_f": "norm",
        "wte": "embed",
        "wpe": "position",
        "lm_head": "head",
        "score": "head",
    }
    stacks = {"h": "num_hidden_layers"}
    ties = (("transformer.wte.weight", "lm_head.weight"),)
    mlp_size = "n_inner"
    why_not = {"residual": LAYER_NORM}

    def blocks_left(self, module: Any, stack: str, kept: list[int], before: list[Any]) -> None:
        """Refuse models that divide attention by the block's number: a block that moves up would change."""
        if module.config.scale_attn_by_inverse_layer_idx:
            raise PlanError("this model divides attention by the block's number; its blocks cannot move up")

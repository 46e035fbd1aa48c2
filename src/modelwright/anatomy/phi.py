"""Phi: the early models with attention and MLP in parallel, and Phi-3 with fused weights."""

from ._base import Anatomy
from .llama import BLOCK, ENDS

LAYER_NORM = "a LayerNorm subtracts the mean over all channels, so the channels that stay would change"


class Phi(Anatomy):
    """Phi-1, Phi-1.5 and Phi-2."""

    name = "phi"
    types = ("phi",)
    roles = {
        "layers.N.self_attn.dense": "attn.o",
        "layers.N.mlp.fc1": "mlp.up",
        "layers.N.mlp.fc2": "mlp.down",
        "final_layernorm": "norm",
        **BLOCK,
        **ENDS,
    }
    why_not = {"residual": LAYER_NORM}


class Phi3(Anatomy):
    """Phi-3 and Phi-4: query, key and value in one weight, gate and up in another."""

    name = "phi3"
    types = ("phi3",)
    roles = {"layers.N.self_attn.qkv_proj": "attn.qkv", "layers.N.mlp.gate_up_proj": "mlp.gate_up", **BLOCK, **ENDS}

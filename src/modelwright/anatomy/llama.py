"""Llama and the models built like it: pre-normed blocks, gated MLP, rotary positions."""

from typing import ClassVar

from ._base import Anatomy

BLOCK = {
    "layers.N.self_attn.q_proj": "attn.q",
    "layers.N.self_attn.k_proj": "attn.k",
    "layers.N.self_attn.v_proj": "attn.v",
    "layers.N.self_attn.o_proj": "attn.o",
    "layers.N.self_attn.*norm": "norm",
    "layers.N.mlp.gate_proj": "mlp.gate",
    "layers.N.mlp.up_proj": "mlp.up",
    "layers.N.mlp.down_proj": "mlp.down",
    "layers.N.*norm": "norm",
}
ENDS = {"embed_tokens": "embed", "norm": "norm", "lm_head": "head", "score": "head", "classifier": "head"}


class Llama(Anatomy):
    """Llama, Mistral, Qwen2 and Qwen3."""

    name = "llama"
    types: ClassVar[tuple[str, ...]] = ("llama", "mistral", "ministral", "qwen2", "qwen3", "smollm3")
    roles = BLOCK | ENDS


class Olmo2(Llama):
    """OLMo 2: norms after attention and MLP, and over all heads of queries and keys together."""

    name = "olmo2"
    types = ("olmo2", "olmo3")
    norms_write = True
    why_not = {"heads": "their query norm runs over all heads together, so the heads that stay would change"}

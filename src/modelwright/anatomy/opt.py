"""OPT: learned positions, ReLU between two linears."""

from ._base import Anatomy
from .phi import LAYER_NORM


class Opt(Anatomy):
    """OPT of all sizes."""

    name = "opt"
    types = ("opt",)
    roles = {
        "layers.N.self_attn.q_proj": "attn.q",
        "layers.N.self_attn.k_proj": "attn.k",
        "layers.N.self_attn.v_proj": "attn.v",
        "layers.N.self_attn.out_proj": "attn.o",
        "layers.N.fc1": "mlp.up",
        "layers.N.fc2": "mlp.down",
        "layers.N.*norm": "norm",
        "final_layer_norm": "norm",
        "embed_tokens": "embed",
        "embed_positions": "position",
        "project_in": "embed.project",
        "project_out": "head.transform",
        "lm_head": "head",
        "score": "head",
    }
    ties = (("model.decoder.embed_tokens.weight", "lm_head.weight"),)
    mlp_size = "ffn_dim"
    why_not = {"residual": LAYER_NORM}

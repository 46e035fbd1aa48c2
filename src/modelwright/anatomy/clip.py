"""CLIP: a text encoder and an image encoder."""

from ._base import Anatomy
from .phi import LAYER_NORM


class Clip(Anatomy):
    """CLIP whole, or its text or image encoder alone."""

    name = "clip"
    types = ("clip", "clip_text_model", "clip_vision_model")
    roles = {
        "layers.N.self_attn.q_proj": "attn.q",
        "layers.N.self_attn.k_proj": "attn.k",
        "layers.N.self_attn.v_proj": "attn.v",
        "layers.N.self_attn.out_proj": "attn.o",
        "layers.N.mlp.fc1": "mlp.up",
        "layers.N.mlp.fc2": "mlp.down",
        "layers.N.layer_norm*": "norm",
        "embeddings.token_embedding": "embed",
        "embeddings.position_embedding": "position",
        "embeddings.patch_embedding": "embed.patch",
        "embeddings.class_embedding": "embed.class",
        "pre_layrnorm": "norm",
        "post_layernorm": "norm",
        "final_layer_norm": "norm",
        "text_projection": "head",
        "visual_projection": "head",
        "logit_scale": "head",
        "classifier": "head",
    }
    stacks = {"encoder.layers": "num_hidden_layers"}
    ties = ()
    why_not = {"residual": LAYER_NORM}

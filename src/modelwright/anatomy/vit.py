"""ViT, with its names in the module and the older ones on disk."""

from ._base import Anatomy
from .phi import LAYER_NORM


class Vit(Anatomy):
    """ViT encoders, with any head."""

    name = "vit"
    types = ("vit",)
    roles = {
        "layers.N.attention.q_proj": "attn.q",
        "layers.N.attention.k_proj": "attn.k",
        "layers.N.attention.v_proj": "attn.v",
        "layers.N.attention.o_proj": "attn.o",
        "layers.N.mlp.fc1": "mlp.up",
        "layers.N.mlp.fc2": "mlp.down",
        "layers.N.layernorm_*": "norm",
        "layer.N.attention.attention.query": "attn.q",
        "layer.N.attention.attention.key": "attn.k",
        "layer.N.attention.attention.value": "attn.v",
        "layer.N.attention.output.dense": "attn.o",
        "layer.N.intermediate.dense": "mlp.up",
        "layer.N.output.dense": "mlp.down",
        "layer.N.layernorm_*": "norm",
        "layernorm": "norm",
        "embeddings.patch_embeddings.projection": "embed.patch",
        "embeddings.position_embeddings": "position",
        "embeddings.*_token": "embed.class",
        "pooler.dense": "head.pool",
        "classifier": "head",
    }
    ties = ()
    why_not = {"residual": LAYER_NORM}

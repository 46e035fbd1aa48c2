"""BERT, and MiniLM, which is one."""

from ._base import Anatomy, Site
from .phi import LAYER_NORM


class Bert(Anatomy):
    """BERT and MiniLM encoders, with any head."""

    name = "bert"
    types = ("bert",)
    roles = {
        "layer.N.attention.self.query": "attn.q",
        "layer.N.attention.self.key": "attn.k",
        "layer.N.attention.self.value": "attn.v",
        "layer.N.attention.output.dense": "attn.o",
        "layer.N.intermediate.dense": "mlp.up",
        "layer.N.output.dense": "mlp.down",
        "layer.N.attention.output.LayerNorm": "norm",
        "layer.N.output.LayerNorm": "norm",
        "embeddings.word_embeddings": "embed",
        "embeddings.position_embeddings": "position",
        "embeddings.token_type_embeddings": "embed.type",
        "embeddings.LayerNorm": "norm",
        "pooler.dense": "head.pool",
        "predictions.transform.dense": "head.transform",
        "predictions.transform.LayerNorm": "norm",
        "predictions.decoder": "head",
        "predictions": "head",
        "seq_relationship": "head",
        "classifier": "head",
        "qa_outputs": "head",
    }
    stacks = {"encoder.layer": "num_hidden_layers"}
    ties = (
        ("bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight"),
        ("cls.predictions.bias", "cls.predictions.decoder.bias"),
    )
    why_not = {"residual": LAYER_NORM}

    def owner(self, site: Site) -> str:
        """The block's attention for its matrices (`self` and `output` lie beside each other), else the block."""
        if site.role.startswith("attn."):
            return site.module.partition(".attention.")[0] + ".attention.self"
        return site.module.rpartition(".")[0].rpartition(".")[0]

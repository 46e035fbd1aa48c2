"""T5: an encoder and a decoder; the first block of each holds the positions of all."""

from __future__ import annotations

from typing import Any

from ._base import Anatomy, Span, Units

ATTENTION = {
    "block.N.layer.*.SelfAttention.": "attn.",
    "block.N.layer.*.EncDecAttention.": "attn.cross_",
}


class T5(Anatomy):
    """T5 and its 1.1 versions, whole or the encoder alone."""

    name = "t5"
    types = ("t5", "mt5")
    roles = {
        **{pattern + word: role + word for pattern, role in ATTENTION.items() for word in "qkvo"},
        "relative_attention_bias": "position",
        "block.N.layer.*.DenseReluDense.wi_0": "mlp.gate",
        "block.N.layer.*.DenseReluDense.wi_1": "mlp.up",
        "block.N.layer.*.DenseReluDense.wi": "mlp.up",
        "block.N.layer.*.DenseReluDense.wo": "mlp.down",
        "block.N.layer.*.layer_norm": "norm",
        "final_layer_norm": "norm",
        "shared": "embed",
        "embed_tokens": "embed",
        "lm_head": "head",
    }
    stacks = {"encoder.block": "num_layers", "decoder.block": "num_decoder_layers"}
    ties = (("shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"),)
    mlp_size = "d_ff"
    norm_eps = "layer_norm_epsilon"

    def _heads(self, module: Any) -> list[Units]:
        """A stack's self-attention heads leave all its blocks together: they share one table of positions."""
        found: list[Units] = []
        whole: dict[str, list[Units]] = {}
        for units in super()._heads(module):
            if ".EncDecAttention" in units.scope:
                found.append(units)
            else:
                whole.setdefault(units.scope.partition(".block.")[0], []).append(units)
        tables = [name for name, _ in module.named_parameters() if "relative_attention_bias" in name]
        for stack, each in whole.items():
            spans = [span for units in each for span in units.spans]
            spans += [Span(name, 1) for name in tables if name.startswith(stack + ".")]
            found.append(Units("heads", None, each[0].count, tuple(spans), stack, "num_key_value_heads"))
        return found

    def blocks_left(self, module: Any, stack: str, kept: list[int], before: list[Any]) -> None:
        """The block that comes first holds the positions."""
        first, old = before[kept[0]].layer[0].SelfAttention, before[0].layer[0].SelfAttention
        if first is not old:
            first.relative_attention_bias, first.has_relative_attention_bias = old.relative_attention_bias, True
        module.get_submodule(stack.rpartition(".")[0]).config.num_layers = len(kept)
        setattr(module.config, "num_layers" if stack.endswith("encoder.block") else "num_decoder_layers", len(kept))

    def channels_left(self, module: Any, ratio: float) -> set[str]:
        """A model that divides its outputs by the root of the width needs no factor in the last norm."""
        if hasattr(module, "model_dim"):
            module.model_dim = module.config.d_model
        scaled = getattr(module.config, "scale_decoder_outputs", False) and hasattr(module, "lm_head")
        return {"decoder.final_layer_norm.weight"} if scaled else set()

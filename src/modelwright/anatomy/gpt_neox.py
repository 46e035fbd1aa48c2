"""GPT-NeoX and Pythia: one weight for query, key and value, which alternate head by head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ._base import Anatomy, Part, Site, Span, _rows, head_width
from .phi import LAYER_NORM


class GptNeox(Anatomy):
    """GPT-NeoX and Pythia."""

    name = "gpt_neox"
    types = ("gpt_neox",)
    roles = {
        "layers.N.attention.query_key_value": "attn.qkv",
        "layers.N.attention.dense": "attn.o",
        "layers.N.mlp.dense_h_to_4h": "mlp.up",
        "layers.N.mlp.dense_4h_to_h": "mlp.down",
        "layers.N.*norm": "norm",
        "final_layer_norm": "norm",
        "embed_in": "embed",
        "lm_head": "head",
        "embed_out": "head",
        "score": "head",
    }
    ties = (("gpt_neox.embed_in.weight", "lm_head.weight"),)
    why_not = {"residual": LAYER_NORM}

    def parts(self, module: Any, site: Site, shape: Sequence[int]) -> tuple[Part, ...]:
        """Query, key and value of head 0, then of head 1, and so on."""
        if site.role != "attn.qkv" or site.module.endswith((".a", ".b")):
            return super().parts(module, site, shape)
        width = head_width(module.get_submodule(self.owner(site)))
        roles = ("attn.q", "attn.k", "attn.v")
        return tuple(Part(roles[n % 3], n * width, (n + 1) * width) for n in range(shape[0] // width))

    def _fused(self, shapes: dict[str, Any], site: Site, repeat: int, width: int) -> list[Span]:
        return _rows(shapes, site, 3 * width, [0])

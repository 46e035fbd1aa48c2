"""Gemma: norms multiply by 1 + weight, and embeddings by the square root of the width."""

from __future__ import annotations

from typing import Any

from ._base import Anatomy
from .llama import BLOCK, ENDS


class Gemma(Anatomy):
    """Gemma, Gemma 2 and the text models of Gemma 3."""

    name = "gemma"
    types = ("gemma", "gemma2", "gemma3_text")
    roles = BLOCK | ENDS
    norm_offset = 1.0

    def channels_left(self, module: Any, ratio: float) -> set[str]:
        """The embedding grows by √ratio, for its factor shrinks; a head tied to it grows too, so its norm need not."""
        embedding = module.get_input_embeddings()
        embedding.weight.data *= ratio**0.5
        embedding.scalar_embed_scale = module.config.hidden_size**0.5
        embedding.embed_scale.fill_(embedding.scalar_embed_scale)
        head = module.get_output_embeddings()
        return {"model.norm.weight"} if head is not None and head.weight is embedding.weight else set()

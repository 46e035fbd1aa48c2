"""The perplexity of an encoder on hidden characters."""

from __future__ import annotations

import math
from typing import Any

import torch


@torch.no_grad()
def perplexity(model: Any, text: Any, length: int, most: int) -> float:
    """Of the hidden tokens of a text, each token hidden once."""
    from modelwright.core import data
    from modelwright.small import HIDDEN, hidden_loss

    ids = data.tokens(text, model.tokenizer, needed=length)[:most]
    rows = ids[: len(ids) // length * length].view(-1, length)
    losses = [hidden_loss(model.module, part, offset) for part in rows.split(16) for offset in range(HIDDEN)]
    return math.exp(float(torch.stack(losses).mean()))

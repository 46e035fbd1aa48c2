"""A small BERT, trained on the characters of a text in some minutes, and its perplexity on hidden ones: an encoder to compress."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

HIDDEN = 7  # one token in so many is hidden
STEPS, BATCH, LENGTH = 2500, 32, 48
SIZES = dict(hidden_size=128, num_hidden_layers=4, num_attention_heads=4, intermediate_size=512, max_position_embeddings=512,
             initializer_range=0.08, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)  # fmt: skip


def trained(text: Any, folder: Path) -> Path:
    """Train on the text, and save as any model of transformers; the same seed gives the same model.

    With positions that begin as waves, wider weights than BERT's, short steps and an optimizer that looks further back, it sees
    neighbours after some hundred steps; without, a model of this size still predicts by frequency alone after a thousand.
    """
    from transformers import BertConfig, BertForMaskedLM

    from modelwright.core import data
    from modelwright.core.contract import letters

    tokenizer = letters()
    ids = data.tokens(text, tokenizer, needed=LENGTH)
    torch.manual_seed(0)
    model = BertForMaskedLM(BertConfig(**SIZES, vocab_size=len(tokenizer) + 1, type_vocab_size=1))
    with torch.no_grad():
        waves(model.bert.embeddings.position_embeddings.weight)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, STEPS)
    for step in range(STEPS):
        starts = torch.randint(len(ids) - LENGTH, (BATCH,)).tolist()
        loss = hidden_loss(model, torch.stack([ids[start : start + LENGTH] for start in starts]), step % HIDDEN)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def waves(positions: Tensor) -> None:
    """Fill positions [n, width] with sines and cosines of falling frequency, as in Vaswani et al. 2017, section 3.5."""
    count, width = positions.shape
    angles = torch.arange(count)[:, None] * 10_000 ** (-torch.arange(0, width, 2) / width)
    positions[:, 0::2], positions[:, 1::2] = 0.3 * angles.sin(), 0.3 * angles.cos()


def hidden_loss(module: Any, ids: Tensor, offset: int) -> Tensor:
    """Mean cross-entropy in nats of every seventh token of ids [rows, length], which is hidden behind the last word of the vocabulary."""
    hidden = (torch.arange(ids.shape[1]) % HIDDEN == offset).expand(ids.shape)
    shown = ids.masked_fill(hidden, module.config.vocab_size - 1)
    return F.cross_entropy(module(input_ids=shown).logits[hidden].float(), ids[hidden])


@torch.no_grad()
def perplexity(model: Any, text: Any, length: int, most: int) -> float:
    """Of the hidden tokens of a text, each token hidden once."""
    from modelwright.core import data

    ids = data.tokens(text, model.tokenizer, needed=length)[:most]
    rows = ids[: len(ids) // length * length].view(-1, length)
    losses = [hidden_loss(model.module, part, offset) for part in rows.split(16) for offset in range(HIDDEN)]
    return math.exp(float(torch.stack(losses).mean()))

"""Small pretrained models that are made here in a minute or two, for trying methods on: a text encoder and an image classifier."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .core import labels
from .core.progress import track

HIDDEN = 7  # one token in so many is hidden
STEPS, BATCH, LENGTH = 2500, 32, 48
ENCODER: dict[str, Any] = dict(
    hidden_size=128, num_hidden_layers=4, num_attention_heads=4, intermediate_size=512, max_position_embeddings=512,
    initializer_range=0.08, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
)  # fmt: skip
VIT: dict[str, Any] = dict(
    hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4, image_size=labels.SIDE, patch_size=4,
    num_labels=2 * labels.ANGLES,
)  # fmt: skip


def encoder(text: Any, folder: Path, steps: int = STEPS) -> Path:
    """Train a BERT on hidden characters of a text (`core.data.Text`), and save it; the same seed gives the same model.

    With positions that begin as waves, wider weights than BERT's, short steps and an optimizer that looks further back, it sees
    neighbours after some hundred steps; without, a model of this size still predicts by frequency alone after a thousand.
    """
    from transformers import BertConfig, BertForMaskedLM

    from .core import data
    from .core.contract import letters

    tokenizer = letters()
    ids = data.tokens(text, tokenizer, needed=LENGTH)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = BertForMaskedLM(BertConfig(**ENCODER, vocab_size=len(tokenizer) + 1, type_vocab_size=1))
        with torch.no_grad():
            waves(model.bert.embeddings.position_embeddings.weight)
        starts = [torch.randint(len(ids) - LENGTH, (BATCH,)).tolist() for _ in range(steps)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, steps)
    for step in track(range(steps), "an encoder"):
        loss = hidden_loss(model, torch.stack([ids[start : start + LENGTH] for start in starts[step]]), step % HIDDEN)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    model.eval().save_pretrained(folder)
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


def vit(steps: int = 600, noise: float = labels.NOISE, batch: int = 64) -> nn.Module:
    """A ViT that was trained on new images of stripes (`core.labels.stripes`) at every step; the same arguments give the same model."""
    from transformers import ViTConfig, ViTForImageClassification

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = ViTForImageClassification(ViTConfig(**VIT))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, steps)
    for step in track(range(steps), "a ViT"):
        examples = labels.stripes(batch, 1000 + step, noise)
        loss = F.cross_entropy(model(pixel_values=examples.images).logits, examples.labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()

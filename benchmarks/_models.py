"""Random models for the benchmarks: Llama layout, bfloat16 or another dtype, from a seed; written tensor by tensor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig

from modelwright.core.model import empty_module
from modelwright.core.weights import Checkpoint, Writer

LARGE = dict(hidden_size=2048, intermediate_size=5632, num_attention_heads=32, num_key_value_heads=4, vocab_size=32000)
SMALL = dict(hidden_size=256, intermediate_size=704, num_attention_heads=8, num_key_value_heads=4, vocab_size=4096)
SPREAD = 0.02  # standard deviation of the weights
CHANGE = 5e-4  # and of what a donor adds to them


def config_of(gigabytes: float) -> dict[str, Any]:
    """A config whose bfloat16 weights take about that much: more blocks, not wider ones, so that sizes compare."""
    sizes = LARGE if gigabytes >= 0.6 else SMALL
    width, inner, vocabulary = sizes["hidden_size"], sizes["intermediate_size"], sizes["vocab_size"]
    key_value = width * sizes["num_key_value_heads"] // sizes["num_attention_heads"]
    block = 2 * width * width + 2 * width * key_value + 3 * width * inner
    layers = round((gigabytes * 1e9 / 2 - 2 * vocabulary * width) / block)
    return sizes | {"num_hidden_layers": max(layers, 1)}


def random_llama(
    folder: str, config: dict[str, Any], seed: int = 0, base: str | None = None, dtype: str = "bfloat16", norms: float = 0.0
) -> int:
    """Write a random Llama; with `base`, that model and a little noise, as a fine-tuned one. Returns its bytes.

    norms: standard deviation of what is added to the weights of norms.
    """
    full = LlamaConfig(**config, tie_word_embeddings=False, max_position_embeddings=2048, architectures=["LlamaForCausalLM"], dtype=dtype)
    stored = getattr(torch, dtype)
    module = empty_module(full)
    random = torch.Generator().manual_seed(seed)
    start = Checkpoint(base) if base else None
    total = 0
    with Writer(folder, overwrite=True) as out:
        for name, value in module.state_dict().items():
            if value.ndim < 2:
                tensor = torch.ones(value.shape) if start is None else start.read(name).float()
                tensor = tensor + torch.randn(value.shape, generator=random) * norms if norms else tensor
            else:
                tensor = torch.empty(value.shape).normal_(0, SPREAD if start is None else CHANGE, generator=random)
                if start is not None:
                    tensor += start.read(name)
            out.add(name, tensor.to(stored))
            total += stored.itemsize * tensor.numel()
        out.write_json("config.json", json.loads(full.to_json_string(use_diff=False)))
    return total


def size_of(folder: Path) -> int:
    """Bytes of the weight files."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))

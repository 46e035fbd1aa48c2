"""Tiny random models of every family, and inputs for them.

Key-value heads are half the query heads, norms are not ones, and rows have unequal lengths: what hides mistakes in
head order, folding and padding is kept out on purpose.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

TEXT = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "max_position_embeddings": 64,
}
GROUPED = TEXT | {"num_key_value_heads": 4, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": None}
PLAIN = TEXT | {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": None}
IMAGE = {
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "image_size": 16,
    "patch_size": 4,
}
EXPERTS = GROUPED | {"num_experts": 8, "num_experts_per_tok": 2}

MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", GROUPED),
    "mistral": ("MistralConfig", "MistralForCausalLM", GROUPED | {"sliding_window": None}),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", GROUPED),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", GROUPED | {"head_dim": 16}),
    "gemma": ("GemmaConfig", "GemmaForCausalLM", GROUPED | {"head_dim": 16}),
    "gemma2": ("Gemma2Config", "Gemma2ForCausalLM", GROUPED | {"head_dim": 16, "sliding_window": 8}),
    "gemma3_text": ("Gemma3TextConfig", "Gemma3ForCausalLM", GROUPED | {"head_dim": 16, "sliding_window": 8}),
    "phi3": ("Phi3Config", "Phi3ForCausalLM", GROUPED),
    "phi": ("PhiConfig", "PhiForCausalLM", GROUPED),
    "olmo2": ("Olmo2Config", "Olmo2ForCausalLM", GROUPED),
    "gpt2": (
        "GPT2Config",
        "GPT2LMHeadModel",
        {
            "vocab_size": 97,
            "n_embd": 64,
            "n_inner": 160,
            "n_layer": 4,
            "n_head": 8,
            "n_positions": 64,
            "pad_token_id": 0,
            "bos_token_id": None,
            "eos_token_id": None,
        },
    ),
    "gpt_neox": ("GPTNeoXConfig", "GPTNeoXForCausalLM", PLAIN),
    "opt": (
        "OPTConfig",
        "OPTForCausalLM",
        {key: value for key, value in PLAIN.items() if key != "intermediate_size"} | {"ffn_dim": 160, "word_embed_proj_dim": 64},
    ),
    "mixtral": ("MixtralConfig", "MixtralForCausalLM", GROUPED | {"num_local_experts": 8, "num_experts_per_tok": 2}),
    "qwen2_moe": (
        "Qwen2MoeConfig",
        "Qwen2MoeForCausalLM",
        EXPERTS | {"moe_intermediate_size": 48, "shared_expert_intermediate_size": 80, "mlp_only_layers": [1]},
    ),
    "qwen3_moe": ("Qwen3MoeConfig", "Qwen3MoeForCausalLM", EXPERTS | {"moe_intermediate_size": 48, "head_dim": 16}),
    "olmoe": ("OlmoeConfig", "OlmoeForCausalLM", EXPERTS),
    "bert": ("BertConfig", "BertForMaskedLM", PLAIN),
    "t5": (
        "T5Config",
        "T5ForConditionalGeneration",
        {
            "vocab_size": 97,
            "d_model": 64,
            "d_kv": 8,
            "d_ff": 160,
            "num_layers": 4,
            "num_heads": 8,
            "pad_token_id": 0,
            "eos_token_id": None,
            "decoder_start_token_id": 0,
            "feed_forward_proj": "gated-gelu",
        },
    ),
    "vit": ("ViTConfig", "ViTForImageClassification", IMAGE),
    "clip": (
        "CLIPConfig",
        "CLIPModel",
        {"text_config": PLAIN | {"eos_token_id": 96}, "vision_config": IMAGE, "projection_dim": 24},
    ),
}
MODULES = ("cnn", "mlp")
CAUSAL = tuple(name for name, (_, cls, _) in MODELS.items() if cls.endswith(("CausalLM", "LMHeadModel")))


class Cnn(nn.Module):
    """Three convolutions, the middle one residual, and a linear."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 8, 3, padding=1)
        self.third = nn.Conv2d(8, 12, 3, stride=2)
        self.head = nn.Linear(12, 5)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.first(input))
        x = torch.relu(x + self.second(x))
        return self.head(torch.relu(self.third(x)).mean((2, 3)))


def tiny(model_type: str = "llama", seed: int = 0, **overrides: Any) -> nn.Module:
    """A random float32 model in eval mode: a family of `MODELS` with its config overridden, or one of `MODULES`."""
    if model_type == "cnn":
        module: nn.Module = Cnn()
    elif model_type == "mlp":
        module = nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 20), nn.ReLU(), nn.Linear(20, 5))
    else:
        import transformers

        config, cls, settings = MODELS[model_type]
        module = getattr(transformers, cls)(getattr(transformers, config)(**(settings | overrides)))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in module.named_parameters():
            owner = type(module.get_submodule(name.rpartition(".")[0])).__name__
            if "Norm" in owner and name.endswith("weight"):
                shift = 1.0 if owner.startswith("Gemma") else 0.0
                weight.copy_(0.5 + torch.rand(weight.shape, generator=generator) - shift)
            else:
                weight.copy_(0.1 * torch.randn(weight.shape, generator=generator))
    return module.eval()


def tiny_inputs(module: nn.Module, seed: int = 0) -> dict[str, torch.Tensor]:
    """Keyword arguments for a tiny model: two rows of tokens, of lengths 12 and 7, or two images."""
    generator = torch.Generator().manual_seed(seed)
    config = getattr(module, "config", None)
    if config is None:
        shape = (2, 3, 16, 16) if isinstance(module, Cnn) else (6, 12)
        return {"input": torch.randn(shape, generator=generator)}
    inputs: dict[str, torch.Tensor] = {}
    if config.model_type in ("vit", "clip"):
        inputs["pixel_values"] = torch.randn(2, 3, 16, 16, generator=generator)
    if config.model_type != "vit":
        ids = torch.randint(1, 96, (2, 12), generator=generator)
        mask = torch.ones_like(ids)
        mask[1, 7:] = 0
        if config.model_type == "clip":
            ids[0, 11] = ids[1, 6] = 96
        inputs |= {"input_ids": ids * mask, "attention_mask": mask}
    if config.model_type == "t5":
        inputs["decoder_input_ids"] = torch.randint(1, 96, (2, 5), generator=generator)
    return inputs


def outputs(module: nn.Module, inputs: dict[str, torch.Tensor] | None = None) -> torch.Tensor:
    """A tiny model's logits on `tiny_inputs`."""
    with torch.no_grad():
        found = module(**(tiny_inputs(module) if inputs is None else inputs))
    if isinstance(found, torch.Tensor):
        return found
    return found.logits_per_image if hasattr(found, "logits_per_image") else found.logits

"""GGUF files, as llama.cpp reads them, of models of Llama's layout.

A preset says the form of the blocks (`maths.gguf_blocks`) of each matrix; norms and biases are float32. A row that no block divides
takes the next form that fits: Q4_K becomes Q5_0, Q6_K becomes Q8_0, and they float16. What a model stores in another way is made
dense first.

Source: the package gguf for names and metadata; ggml-org/llama.cpp, `llama-quant.cpp` for the presets and `convert_hf_to_gguf.py` for
the order of the rows of q and k.
Differs: presets look at the shapes that rows have, and not at how many heads share a value.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from modelwright.blocks._stored import Stored
from modelwright.core import loading
from modelwright.core.errors import ModelError, NeedError, refuse
from modelwright.core.model import Model, unwrapped
from modelwright.core.progress import console, track
from modelwright.formats._layout import refuse_other_sizes
from modelwright.maths import gguf_blocks

FILE = "model.gguf"
ARCHITECTURES = {"llama": "LLAMA", "mistral": "LLAMA", "qwen2": "QWEN2", "qwen3": "QWEN3"}  # model_type: of gguf.MODEL_ARCH
PRESETS = {
    "f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0", "q4_0": "MOSTLY_Q4_0", "q4_k_m": "MOSTLY_Q4_K_M",
    "q6_k": "MOSTLY_Q6_K",
}  # fmt: skip  # of gguf.LlamaFileType
NEXT = {"Q4_K": "Q5_0", "Q6_K": "Q8_0", "Q5_0": "F16", "Q8_0": "F16", "Q4_0": "F16"}  # for rows that the blocks do not divide
HALF = torch.finfo(torch.float16).max
LEAST, LEAST_OF_SUPER = 1e-4, 2e-3  # largest sizes whose scales, or scales of scales, float16 holds with some bits
FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# How text is cut into words before its letters are joined, by the pattern in tokenizer.json: the name that llama.cpp has for it.
LLAMA_3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
CUTS = {LLAMA_3: "llama-bpe", LLAMA_3.replace("{1,3}", ""): "qwen2"}


def form_of(name: str, shape: tuple[int, ...], preset: str, blocks: int) -> str:
    """The form of a tensor by its name in the file and its shape, [out, in] or [n]."""
    if len(shape) < 2:
        return "F32"
    form = {"q4_k_m": "Q4_K"}.get(preset, preset.upper())
    if form.startswith("Q4"):
        number = int(name.split(".")[1]) if name.startswith("blk.") else 0
        eighth = blocks // 8
        often = number < eighth or number >= 7 * blocks // 8 or (number - eighth) % 3 == 2
        if name == "output.weight" or (form == "Q4_K" and often and name.split(".")[-2] in ("attn_v", "ffn_down")):
            form = "Q6_K"
    while form in NEXT and shape[1] % gguf_blocks.FORMS[form].values:
        form = NEXT[form]
    return form


def interleaved(rows: Tensor, heads: int) -> Tensor:
    """Rows of q or k [heads · size, ...], each head's halves in turns: llama.cpp rotates neighbours, transformers halves."""
    return rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(rows.shape)


def halved(rows: Tensor, heads: int) -> Tensor:
    """Rows in the order that transformers has, of those that are `interleaved`."""
    return rows.unflatten(0, (heads, -1, 2)).transpose(1, 2).reshape(rows.shape)


def rope_factors(config: Any) -> Tensor:
    """What Llama 3.1's rotation divides its frequencies by, float32 [head size / 2]."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    frequencies, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    shares = torch.arange(len(frequencies)) / len(frequencies)
    return config.rope_parameters["rope_theta"] ** -shares / frequencies


class File:
    """A model as a GGUF file, checked and ready to be written."""

    def __init__(self, model: Model, preset: str):
        try:
            import gguf
        except ImportError:
            raise NeedError("The package gguf writes these files and is not installed. Run `pip install 'modelwright[formats]'`.") from None
        self.gguf, self.model, self.preset = gguf, model, preset
        self.module: Any = unwrapped(model.module)
        self._refuse()
        config: Any = self.module.config
        self.config, self.blocks = config, config.num_hidden_layers
        kind = gguf.MODEL_ARCH[ARCHITECTURES[config.model_type]]
        self.architecture: str = gguf.MODEL_ARCH_NAMES[kind]
        table = gguf.get_tensor_name_map(kind, self.blocks)
        self.sources = dict(self._tensors())
        self.names = {name: table.get_name(name, try_suffixes=(".weight", ".bias")) or "" for name in self.sources}
        if unknown := [name for name, found in self.names.items() if not found]:
            raise ModelError(f"{model.name}: GGUF has no name in {self.architecture} for {', '.join(unknown)}. Save the model as it is.")
        self.shapes = {name: _shape(source) for name, source in self.sources.items()}
        self.forms = {name: self._form(name) for name in self.sources}
        whys = {name: self._unfit(name) for name in self.forms}
        refuse(ModelError, [f"{model.name}: {name} holds values that {why}" for name, why in whys.items() if why])

    def _unfit(self, name: str) -> str:
        """Why a tensor's values cannot be stored in its form, as the end of a sentence; "" if they can."""
        form, largest = self.forms[name], float(self.dense(name).abs().max())
        if not math.isfinite(largest):
            return "are NaN or infinite. Check the model."
        if form in ("F32", "BF16"):
            return ""
        if largest > HALF:
            return "float16 cannot. Write gguf-bf16."
        small = 0 < largest < (LEAST_OF_SUPER if form.endswith("_K") else LEAST)
        return f"are too small for the float16 scales of {form}, at most {largest:.1e}. Write gguf-bf16." if small else ""

    def _refuse(self) -> None:
        config, name = getattr(self.module, "config", None), self.model.name
        if "adapters" in self.model.marks:
            raise ModelError(f"{name} bears an adapter, and GGUF is written of whole models. Use adapt.fold first.")
        kind = getattr(config, "model_type", type(self.module).__name__)
        if config is None or kind not in ARCHITECTURES or not hasattr(self.module, "lm_head"):
            known = ", ".join(ARCHITECTURES)
            raise ModelError(f"{name} is a {kind}; GGUF is written here of {known} that predict tokens. Use llama.cpp's converter.")
        layers = {path: self.module.get_submodule(path) for path in loading.described(self.module)}
        reasons = [
            f"{path} is another part than the architecture has"
            for path, layer in layers.items()
            if not isinstance(layer, Stored) or layer.replaces not in ("Linear", "Embedding")
        ]
        rotation = _rotation(config)
        reasons += [f"positions are rotated as {rotation}"] if rotation not in ("default", "llama3") else []
        reasons += [f"the activation is {config.hidden_act}"] if config.hidden_act != "silu" else []
        refuse(ModelError, [f"{name}: GGUF cannot hold it: {reason}. Save the model as it is." for reason in reasons])
        refuse_other_sizes(name, self.module)

    def _tensors(self) -> Iterator[tuple[str, Tensor | Stored]]:
        """Name -> tensor, or the layer that stands for it; tied ones once."""
        if _rotation(self.config) == "llama3":
            yield "rope.freqs.weight", rope_factors(self.config)
        tied = set(self.module._tied_weights_keys or ()) if self.config.tie_word_embeddings else set()
        stored = {path: layer for path, layer in self.module.named_modules() if isinstance(layer, Stored)}
        for path, layer in stored.items():
            if not any(path.startswith(f"{outer}.") for outer in stored):
                yield f"{path}.weight", layer
                if (bias := getattr(layer, "bias", None)) is not None:
                    yield f"{path}.bias", bias.detach()
        for name, value in self.module.state_dict().items():
            if name not in tied and not any(name.startswith(f"{outer}.") for outer in stored):
                yield name, value

    def _form(self, name: str) -> str:
        head = self.config.tie_word_embeddings and name == "model.embed_tokens.weight"
        return form_of("output.weight" if head else self.names[name], self.shapes[name], self.preset, self.blocks)

    def dense(self, name: str) -> Tensor:
        """The values of a tensor, with rows as llama.cpp has them."""
        source = self.sources[name]
        values = (source.dense() if isinstance(source, Stored) else source).detach()
        part = name.split(".")[-2]
        if self.architecture == "llama" and part in ("q_proj", "k_proj"):
            return interleaved(values, self.config.num_attention_heads if part == "q_proj" else self.config.num_key_value_heads)
        return values

    def write(self, folder: Path) -> None:
        """Write the file into an existing folder; matrices are made one by one."""
        out = self.gguf.GGUFWriter(folder / FILE, self.architecture)
        self._add_sizes(out)
        if why := self._add_tokenizer(out, folder):
            console.print(f"note: the tokenizer is not in {FILE}, for {why}; its files are beside it", markup=False)
        for name, form in self.forms.items():
            shape, block = self.shapes[name], gguf_blocks.FORMS.get(form)
            width = FLOATS[form].itemsize * shape[-1] if block is None else shape[-1] // block.values * block.bytes
            kind = self.gguf.GGMLQuantizationType[form]
            nbytes = math.prod(shape[:-1]) * width
            out.add_tensor_info(self.names[name], (*shape[:-1], width), np.dtype(np.uint8), nbytes, raw_dtype=kind)
        out.write_header_to_file()
        out.write_kv_data_to_file()
        out.write_ti_data_to_file()
        for name, form in track(list(self.forms.items()), "writing"):
            values = self.dense(name).contiguous()
            held = values.to(FLOATS[form]).view(torch.uint8) if form in FLOATS else gguf_blocks.encode(values, form)
            out.write_tensor_data(held.cpu().numpy())
        out.close()

    def _add_sizes(self, out: Any) -> None:
        config = self.config
        heads = config.num_attention_heads
        size = getattr(config, "head_dim", None) or config.hidden_size // heads
        window = getattr(config, "sliding_window", None)  # within which a model without one does the same
        out.add_name(self.architecture)  # transformers misreads names with mistral in them
        out.add_context_length(min(config.max_position_embeddings, window or config.max_position_embeddings))
        out.add_embedding_length(config.hidden_size)
        out.add_block_count(self.blocks)
        out.add_feed_forward_length(config.intermediate_size)
        out.add_head_count(heads)
        out.add_head_count_kv(config.num_key_value_heads)
        out.add_key_length(size)
        out.add_value_length(size)
        out.add_rope_dimension_count(size)
        out.add_rope_freq_base(config.rope_parameters["rope_theta"])
        out.add_layer_norm_rms_eps(config.rms_norm_eps)
        out.add_vocab_size(config.vocab_size)
        out.add_file_type(self.gguf.LlamaFileType[PRESETS[self.preset]])
        out.add_quantization_version(self.gguf.GGML_QUANT_VERSION)

    def _add_tokenizer(self, out: Any, folder: Path) -> str:
        """Add the tokenizer whose files lie in a folder; returns why it cannot be, "" if it is there."""
        file = folder / "tokenizer.json"
        if not file.is_file():
            return "there is no tokenizer.json"
        stated = json.loads(file.read_text("utf-8"))
        cut = cut_of(stated.get("pre_tokenizer") or {})
        model, added = stated["model"], stated.get("added_tokens") or []
        if model["type"] != "BPE" or model.get("byte_fallback") or (stated.get("decoder") or {}).get("type") != "ByteLevel":
            return "only pairs of bytes (BPE) that are joined have a form here"
        if cut is None or stated.get("normalizer"):
            return "llama.cpp's name for how it cuts text is not known here"
        kinds = self.gguf.TokenType
        tokens = {number: (token, kinds.NORMAL) for token, number in model["vocab"].items()}
        tokens |= {one["id"]: (one["content"], kinds.CONTROL if one["special"] else kinds.USER_DEFINED) for one in added}
        every = [tokens.get(number, (f"[PAD{number}]", kinds.UNUSED)) for number in range(self.config.vocab_size)]
        out.add_tokenizer_model("gpt2")
        out.add_tokenizer_pre(cut)
        out.add_token_list([token for token, _ in every])
        out.add_token_types([kind for _, kind in every])
        self.gguf.SpecialVocab(folder, load_merges=True, n_vocab=self.config.vocab_size).add_to_gguf(out, quiet=True)
        return ""


def cut_of(stated: dict[str, Any]) -> str | None:
    """llama.cpp's name for how a tokenizer cuts text into words, by its pre_tokenizer in tokenizer.json; None if it is not known."""
    steps = stated.get("pretokenizers") or [stated]
    patterns = [step["pattern"].get("Regex") for step in steps if step.get("type") == "Split"]
    last = steps[-1]
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space") or len(steps) != len(patterns) + 1:
        return None
    if not patterns:
        return "gpt-2" if last.get("use_regex", True) else None
    return CUTS.get(patterns[0]) if len(patterns) == 1 and not last.get("use_regex", True) else None


def _rotation(config: Any) -> str:
    return (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")


def _shape(source: Tensor | Stored) -> tuple[int, ...]:
    return (source.out_features, source.in_features) if isinstance(source, Stored) else tuple(source.shape)


def writer(model: Model, preset: str) -> File:
    """The file of a model in this preset."""
    return File(model, preset)

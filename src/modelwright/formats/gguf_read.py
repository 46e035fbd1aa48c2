"""GGUF files as models: what their blocks stand for, as dense weights of the architecture in transformers, so that any method can follow.

Only the header is read when a file is opened. The dense copy is made when weights or sizes are first needed, a slice at a time, so
that memory does not grow with the file. Weights are in the file's own type where that is float16 or bfloat16 throughout, else in
float32, which holds every value that blocks stand for.

Source: the package gguf reads the header and makes values of the blocks that `maths.gguf_blocks` has none for; transformers makes the
tokenizer, where none lies beside the file.
"""

from __future__ import annotations

import math
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from modelwright.core.errors import ModelError, NeedError, WeightsError, nearest, refuse
from modelwright.core.model import Made, class_of, plain_module, quiet, tokenizer_files
from modelwright.core.progress import console
from modelwright.core.weights import OnDisk, Place, Writer
from modelwright.formats.gguf import ARCHITECTURES, FILE, FLOATS, halved, rope_factors
from modelwright.maths import gguf_blocks
from modelwright.maths.slices import Sliced

KINDS = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}  # an architecture of GGUF: the model_type
ROPE = "rope_freqs.weight"  # what Llama 3.1 divides the frequencies of its rotation by
LLAMA_3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
AGAIN = "Fetch it again."
UNREAD = (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, NotImplementedError)  # of a tokenizer that is not known


class Held:
    """A tensor of a file: its form, its shape as transformers has it, and its bytes."""

    def __init__(self, file: Path, tensor: Any, decode: Any):
        self.form: str = tensor.tensor_type.name
        self.shape = tuple(int(size) for size in reversed(tensor.shape))
        self.place = Place(file, int(tensor.data_offset), int(tensor.n_bytes), torch.uint8, (int(tensor.n_bytes),))
        self._decode = decode

    def sliced(self, dtype: torch.dtype) -> Sliced:
        """Its values, read and decoded slice by slice; slices begin and end with blocks, and blocks with rows."""
        stored, decode = OnDisk(self.place), self._decode
        count, nbytes = math.prod(self.shape), self.place.nbytes
        return Sliced(self.shape, dtype, lambda at: decode(stored[at.start * nbytes // count : at.stop * nbytes // count]))


class Gguf(Made):
    """A model in a GGUF file.

    Raises NeedError when the package gguf is missing, WeightsError when the file is no whole GGUF file, and ModelError when the model
    in it is none that is known here.
    """

    def __init__(self, file: Path, **others: Any):
        try:
            import gguf
        except ImportError:
            raise NeedError("The package gguf reads these files and is not installed. Run `pip install 'modelwright[formats]'`.") from None
        self.gguf, self.file = gguf, file
        super().__init__(**others)
        fields, tensors = self._header()
        self.kind = self._kind(fields)
        self.held = {tensor.name: Held(file, tensor, self._decoder(tensor)) for tensor in tensors}
        self.stated = self._stated(fields)
        self.tokens: list[str] = fields.get("tokenizer.ggml.tokens") or []
        self.places = self._places()

    @property
    def sources(self) -> list[Path]:
        return [self.file]

    def _header(self) -> tuple[dict[str, Any], list[Any]]:
        """The file's entries by name, without merges, and its tensors."""
        try:
            reader = self.gguf.GGUFReader(self.file)
            if reader.byte_order == "S":
                raise ValueError("its bytes are in another order than this machine's")
            skipped = "tokenizer.ggml.merges"  # hundreds of thousands of texts
            return {name: field.contents() for name, field in reader.fields.items() if name != skipped}, reader.tensors
        except (ValueError, IndexError, KeyError, OverflowError, MemoryError) as error:
            raise WeightsError(f"{self.file} is no whole GGUF file ({error}). {AGAIN}") from None

    def _kind(self, fields: dict[str, Any]) -> str:
        """The architecture in the file."""
        known = ", ".join(KINDS)
        if fields.get("split.count", 1) > 1:
            raise ModelError(f"{self.file} is one of {fields['split.count']} files. Join them with llama.cpp's llama-gguf-split --merge.")
        kind = fields.get("general.architecture")
        if kind not in KINDS:
            raise ModelError(
                f"{self.file} holds a {kind}; GGUF is read here of {known}.{nearest(str(kind), KINDS)} "
                "Open the model that it was made from."
            )
        return kind

    def _decoder(self, tensor: Any) -> Any:
        """What makes values of bytes of this tensor."""
        form = tensor.tensor_type.name
        if form in FLOATS:
            return lambda stored: stored.view(FLOATS[form])
        if form in gguf_blocks.FORMS:
            return lambda stored: gguf_blocks.decode(stored, form)
        if tensor.tensor_type not in self.gguf.quants._type_traits:
            raise ModelError(f"{self.file}: {tensor.name} is stored as {form}, which is not read here. Open what it was made from.")
        return lambda stored: torch.from_numpy(np.ascontiguousarray(self.gguf.quants.dequantize(stored.numpy(), tensor.tensor_type)))

    def _stated(self, fields: dict[str, Any]) -> dict[str, Any]:
        """What config.json says of the model."""

        def entry(name: str, default: Any = None) -> Any:
            value = fields.get(f"{self.kind}.{name}", default)
            if value is None:
                raise WeightsError(f"{self.file} does not say {self.kind}.{name}. {AGAIN}")
            return value

        hidden, heads = entry("embedding_length"), entry("attention.head_count")
        size = entry("attention.key_length", hidden // heads if isinstance(heads, int) else 0)
        scaling = entry("rope.scaling.type", "none")
        odd = {
            "experts": bool(entry("expert_count", 0)),
            "other numbers of heads or neurons from block to block": not all(
                isinstance(entry(name, 0), int) for name in ("attention.head_count", "attention.head_count_kv", "feed_forward_length")
            ),
            "heads that are rotated in part": entry("rope.dimension_count", size) != size,
            "values of another size than keys": entry("attention.value_length", size) != size,
            f"positions that are rotated as {scaling}": scaling != "none" or entry("rope.scale_linear", 1.0) != 1.0,
        }
        refuse(ModelError, [f"{self.file} has {what}, which is not read here. Open the model that it was made from."
                            for what, there in odd.items() if there])  # fmt: skip
        stated = {
            "model_type": KINDS[self.kind], "hidden_size": hidden, "num_attention_heads": heads, "head_dim": size,
            "num_key_value_heads": entry("attention.head_count_kv", heads), "num_hidden_layers": entry("block_count"),
            "intermediate_size": entry("feed_forward_length"), "max_position_embeddings": entry("context_length"),
            "rms_norm_eps": entry("attention.layer_norm_rms_epsilon"), "vocab_size": self._vocabulary(), "hidden_act": "silu",
            "rope_parameters": {"rope_type": "default", "rope_theta": entry("rope.freq_base", 10000.0)},
            "tie_word_embeddings": "output.weight" not in self.held, "dtype": str(self._dtype()).removeprefix("torch."),
        }  # fmt: skip
        for key in ("bos", "eos"):
            stated[f"{key}_token_id"] = fields.get(f"tokenizer.ggml.{key}_token_id")
        if self.kind != "qwen2":
            stated["attention_bias"] = "blk.0.attn_q.bias" in self.held
        if self.kind == "llama":
            stated["mlp_bias"] = "blk.0.ffn_up.bias" in self.held
        if ROPE in self.held:
            stated["rope_parameters"] |= self._rotation(stated)
        return stated

    def _vocabulary(self) -> int:
        if "token_embd.weight" not in self.held:
            raise WeightsError(f"{self.file} lacks the tensor 'token_embd.weight'. {AGAIN}")
        return self.held["token_embd.weight"].shape[0]

    def _dtype(self) -> torch.dtype:
        """The narrowest dtype that holds every value."""
        forms = {held.form for held in self.held.values() if len(held.shape) > 1}
        if len(forms) == 1 and (dtype := FLOATS.get(forms.pop())):
            small = [held.sliced(torch.float32).whole() for name, held in self.held.items() if len(held.shape) < 2 and name != ROPE]
            if all(torch.equal(values.to(dtype).float(), values) for values in small):
                return dtype
        return torch.float32

    def _rotation(self, stated: dict[str, Any]) -> dict[str, Any]:
        """The settings of Llama 3.1's rotation that the file's factors are made by.

        Raises:
            ModelError: there are none.
        """
        factors = self.held[ROPE].sliced(torch.float32).whole()
        settings = LLAMA_3 | {"factor": factors.max().item()}
        made = rope_factors(_config_of(stated | {"rope_parameters": stated["rope_parameters"] | settings}))
        if made.shape != factors.shape or not torch.allclose(made, factors, rtol=1e-4):
            raise ModelError(f"{self.file}: {ROPE} are not the factors of Llama 3.1's rotation. Open the model that it was made from.")
        return settings

    def _places(self) -> dict[str, Held]:
        """Name in transformers -> tensor. Raises WeightsError when what the file holds is not what such a model has."""
        config = _config_of(self.stated)
        self.stated["architectures"] = [class_of(config).__name__]
        module = plain_module(config)
        table = self.gguf.get_tensor_name_map(self.gguf.MODEL_ARCH[ARCHITECTURES[KINDS[self.kind]]], config.num_hidden_layers)
        tied = set(module._tied_weights_keys or ()) if config.tie_word_embeddings else set()
        wanted = {name: table.get_name(name, try_suffixes=(".weight", ".bias")) for name in module.state_dict() if name not in tied}
        places, faults = {}, []
        for name, theirs in wanted.items():
            shape = tuple(module.get_parameter(name).shape)
            if theirs not in self.held:
                faults.append(f"{self.file} lacks the tensor {theirs!r}. {AGAIN}")
            elif self.held[theirs].shape != shape:
                faults.append(f"{self.file}: {theirs!r} is {list(self.held[theirs].shape)}, and its sizes ask for {list(shape)}. {AGAIN}")
            else:
                places[name] = self.held[theirs]
        if others := self.held.keys() - {ROPE, *wanted.values()}:
            faults.append(f"{self.file} holds {len(others)} tensors that no {self.kind} has, first {min(others)!r}.")
        refuse(WeightsError, faults)
        return places

    def write(self, folder: Path) -> None:
        dtype = getattr(torch, self.stated["dtype"])
        heads = {"q_proj": self.stated["num_attention_heads"], "k_proj": self.stated["num_key_value_heads"]}
        with Writer(folder) as out:
            for name, held in self.places.items():
                values: Sliced | Tensor = held.sliced(dtype)
                if self.kind == "llama" and (part := name.split(".")[-2]) in heads:
                    values = halved(held.sliced(dtype).whole(), heads[part])
                out.add(name, values)
            out.write_json("config.json", self.stated)
        self._write_tokenizer(folder)

    def _write_tokenizer(self, folder: Path) -> None:
        """The tokenizer that lies beside the file, where no word of it has another number, or the one in the file."""
        from transformers import AutoTokenizer

        if self._tokenizer is not None:
            self._tokenizer.save_pretrained(folder)
            return
        why = "there is none in it"
        with tempfile.TemporaryDirectory(prefix="modelwright-") as lone:  # where transformers looks at no other file
            (Path(lone) / FILE).symlink_to(self.file)
            places: list[tuple[Any, dict[str, str]]] = [(self.file.parent, {})] if tokenizer_files(self.file.parent) else []
            for place, more in [*places, *([(lone, {"gguf_file": FILE})] if self.tokens else [])]:
                try:
                    with quiet():
                        found = AutoTokenizer.from_pretrained(place, local_files_only=True, **more)
                except UNREAD as error:
                    why = next(iter(str(error).splitlines()), type(error).__name__)
                    continue
                if self._same(found):
                    found.save_pretrained(folder)
                    return
                why = "the one beside it has other tokens"
        console.print(f"note: {self.file.name} is opened without a tokenizer, for {why}; give one with `tokenizer=`", markup=False)

    def _same(self, tokenizer: Any) -> bool:
        """Whether no word of a tokenizer has another number in the file."""
        known = dict(enumerate(self.tokens))
        return all(known.get(number, word) == word for word, number in tokenizer.get_vocab().items())


def _config_of(stated: dict[str, Any]) -> Any:
    from transformers import AutoConfig

    return AutoConfig.for_model(**stated)

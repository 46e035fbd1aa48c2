"""A model: opened from a folder, the hub or memory; read only when needed; saved so that plain tools load it.

transformers is imported where a module is built, not before: what streams tensors from file to file needs none.
"""

from __future__ import annotations

import contextlib
import copy
import json
import shutil
import tempfile
import warnings
import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from modelwright.anatomy import Anatomy, Site, anatomy_of
from modelwright.blocks._stored import Stored

from . import hub, loading, sharing
from .errors import ModelError, WeightsError, nearest
from .files import read_json, restore, whole_folder, write_json, write_text
from .weights import Checkpoint, Writer, check_finite, not_finite

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from modelwright.formats._layout import Layout

RECORD = "modelwright.json"
COMPRESSED = "compressed.json"  # beside a checkpoint that `compress` wrote, whose tensors no module has
GUESTS = {"dropping", "token_router", "adapter", "beside"}  # kinds of layers whose work no method on weights may change afterwards
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "vocab.txt", "spiece.model", "chat_template.jinja", "chat_template.json",
    "preprocessor_config.json", "processor_config.json",
)  # fmt: skip


class Model:
    """A model with its tokenizer, its anatomy, and the marks that say which methods it can take.

    Made by `open`. `folder` is where its checkpoint lies, None for a model that came as a module; `module` reads the
    weights when first asked for.
    """

    def __init__(self, *, name: str, folder: Path | None = None, module: nn.Module | None = None,
                 tokenizer: Any = None, trust_remote_code: bool = False):  # fmt: skip
        self.name = name
        self.folder = folder
        self.trust_remote_code = trust_remote_code
        self.history: list[dict[str, Any]] = []
        self.unread: list[str] = []  # tensors of its files that the module has no place for
        self.changed = False  # whether a method has changed it in memory, so that its folder holds something else
        self.rebased = False  # whether the weights that its adapter stands beside are no longer those of the base that it names
        self._module = module
        self._tokenizer = tokenizer
        self._lent: Model | None = None  # whose tokenizer it has, in the place of its folder's
        self._config: Any = getattr(module, "config", None)
        self._marks: set[str] | None = None
        if folder is not None:
            self._recorded(folder)

    def _recorded(self, folder: Path) -> None:
        """Take the steps and marks from the record in a folder, where there is one."""
        if (folder / RECORD).is_file():
            record = json.loads((folder / RECORD).read_text("utf-8"))
            self.history = record["steps"]
            self._marks = set(record["marks"])

    def __repr__(self) -> str:
        return f"<Model {self.name}{'' if self._module is not None else ', not read yet'}>"

    @property
    def config(self) -> Any:
        """The transformers config; None for other modules."""
        if self._config is None and self.folder is not None:
            self._config = read_config(self.folder, self.trust_remote_code)
        return self._config

    @property
    def module(self) -> nn.Module:
        """The module with its weights, in evaluation mode."""
        if self._module is None:
            self._module = load_module(self.stored_in, self.config, self.trust_remote_code, self.unread).eval()
        return self._module

    @module.setter
    def module(self, module: nn.Module) -> None:
        self._module = module
        if hasattr(config := getattr(module, "config", None), "to_dict"):
            self._config = config

    def forget(self) -> None:
        """Give the weights' memory back; they are read again when next asked for."""
        if self.folder is not None and not self.changed:
            self._module = None

    @property
    def sources(self) -> list[Path]:
        """The folders whose files it is made of, or the file; none for a model that came as a module."""
        return [] if self.folder is None else [self.folder]

    @property
    def stored_in(self) -> Path:
        """The folder of a model that lies in one."""
        assert self.folder is not None, self
        return self.folder

    @property
    def loaded(self) -> bool:
        """Whether the weights are in memory."""
        return self._module is not None

    @property
    def checkpoint(self) -> Checkpoint | None:
        """The files on disk, when the model lies in a folder and has not been changed in memory."""
        return Checkpoint(self.folder) if self.folder is not None and self._module is None else None

    @property
    def tokenizer(self) -> Any:
        """The tokenizer; None when the folder has none."""
        if self._tokenizer is None and self.folder is not None and tokenizer_files(self.folder):
            from transformers import AutoTokenizer

            try:
                self._tokenizer = AutoTokenizer.from_pretrained(self.folder, trust_remote_code=self.trust_remote_code)
            except (OSError, ValueError, KeyError) as error:
                raise ModelError(f"{self.name}: its tokenizer cannot be read ({error}). Copy it from the original model.") from error
        return self._tokenizer

    def take_tokenizer(self, other: Model) -> None:
        """Have another model's tokenizer, and its files when the model is saved."""
        self._tokenizer, self._lent = other.tokenizer, other._lent or other

    @property
    def anatomy(self) -> Anatomy:
        """Which tensor plays which role."""
        if self._module is not None:
            return anatomy_of(unwrapped(self._module))
        return anatomy_of(self.config if self.folder is None else stated_config(self.folder))

    def sites(self) -> list[Site]:
        """All weight matrices, in the order of the model; of the real module, or of an empty one if it is not read."""
        module = unwrapped(self.module) if self.loaded else self.skeleton()
        return anatomy_of(module).sites(module)

    def skeleton(self) -> nn.Module:
        """The module with empty (meta) tensors; no weight is read."""
        if self._module is not None:
            return self._module
        return empty_module(self.config)

    @property
    def dense(self) -> bool:
        """Whether every layer is plain: none is stored as factors, masks or packed integers, or shares its weights."""
        if self._module is not None:
            return loading.quantization_config(self._module) is None
        return self.folder is None or "quantization_config" not in stated_config(self.folder)

    @property
    def marks(self) -> set[str]:
        """Of `core.method.MARKS`."""
        if self._marks is None:
            described = {} if self.dense else loading.described(self.module) if self.loaded else stated_descriptions(self.config)
            kinds = {text["kind"] for text in described.values()}
            self._marks = {"float"}
            self._marks |= {"low-rank"} if kinds & {"low_rank", "tensor_linear", "tensor_embedding", "tensor_conv"} else set()
            self._marks |= {"sparse"} if "sparse" in kinds else set()
            trained = [text["packed"] for text in described.values() if text["kind"] in ("ternary", "phases")]
            self._marks |= {"rounding"} if not all(trained) else set()
            if loading.holds_codes(described):
                self._marks = (self._marks | {"packed"}) - {"float"}
            self._marks -= {"float"} if kinds & GUESTS else set()
            if hasattr(self._module, "get_base_model") or (self.folder is not None and (self.folder / "adapter_config.json").is_file()):
                self._marks.add("adapters")
        return self._marks

    @marks.setter
    def marks(self, marks: set[str]) -> None:
        self._marks = set(marks)

    def save(self, folder: str | Path, *, overwrite: bool = False) -> Path:
        """Write the model, its tokenizer, its record and a card; the folder appears when it is whole.

        Raises:
            RecipeError: the folder holds something and `overwrite` is false.
        """
        final = Path(folder)
        with whole_folder(final, overwrite=overwrite) as partial:
            save_module(self.module, partial)
            if self.rebased and hasattr(self.module, "peft_config"):
                from .adapters import save_base

                save_base(self.module, partial, final)
            self.save_beside(partial)
            write_card(self.name, self.history, partial)
        return final

    def save_beside(self, folder: Path) -> None:
        """Write what stands beside the weights: tokenizer and record."""
        beside = self._lent.folder if self._lent else self.folder
        if beside is not None:
            for file in tokenizer_files(beside):
                shutil.copyfile(file, folder / file.name)
        elif self._tokenizer is not None:
            self._tokenizer.save_pretrained(folder)
        write_json(folder / RECORD, {"steps": self.history, "marks": sorted(self.marks)})


def write_card(name: str, history: list[dict[str, Any]], folder: Path) -> None:
    """Write README.md, which says how the model that lies in a folder loads and what was done to it."""
    from modelwright import report

    write_text(folder / "README.md", report.saved_card(name, history, folder))


class Made(Model, ABC):
    """A model whose folder is written to a temporary place when it is first asked for, and goes with the object."""

    _made: Path | None = None

    @abstractmethod
    def write(self, folder: Path) -> None:
        """Write it into a folder that is not there yet, or empty."""

    @property
    def folder(self) -> Path:  # type: ignore[override]
        """Where the result lies.

        Raises:
            ModelError: there is no such result.
        """
        if self._made is None:
            made = Path(tempfile.mkdtemp(prefix="modelwright-"))
            weakref.finalize(self, shutil.rmtree, made, ignore_errors=True)
            self.write(made)
            self._made = made
        return self._made

    @folder.setter
    def folder(self, _: Path | None) -> None:
        """It has none of its own."""


class Folded(Made):
    """A model with a peft adapter put into its weights: "folder+adapter".

    Raises ModelError when the adapter is not stored as safetensors; `folder` raises it when the base is no dense model, or the adapter
    not one of it.
    """

    def __init__(self, base: Model, adapter: Path):
        refuse_pickled(adapter)
        self.base, self.adapter = base, adapter
        super().__init__(name=f"{base.name}+{adapter}", tokenizer=base._tokenizer, trust_remote_code=base.trust_remote_code)

    def write(self, folder: Path) -> None:
        base = (
            open(self.base)
            if isinstance(self.base, Folded)
            else open(self.base.folder or self.base, trust_remote_code=self.trust_remote_code)
        )
        base.marks -= {"sparse"}  # an update fills zeros in
        save_module(self._folded(base), folder)
        base.save_beside(folder)

    @property
    def sources(self) -> list[Path]:
        return [*self.base.sources, self.adapter]

    def _folded(self, base: Model) -> nn.Module:
        from peft import PeftModel

        from .adapters import folded

        if not base.dense or "adapters" in base.marks:
            raise ModelError(f"{self.name}: only a dense model can take an adapter into its weights, and {base.name} is none.")
        with quiet():
            try:
                borne: Any = PeftModel.from_pretrained(load_module(base.stored_in, base.config, base.trust_remote_code), str(self.adapter))
                return folded(borne)[0]
            except (ValueError, RuntimeError, KeyError) as error:
                first = str(error).strip().splitlines()[0]
                raise ModelError(
                    f"{self.adapter} is no adapter of {base.name} ({first}). Name the model that it was trained on."
                ) from error


class Translated(Made):
    """A model in a folder of another tool's, whose layers become ours with the same codes and scales.

    Raises ModelError when its config says what no layer of ours can be; `folder` raises it when one of the layers does.
    """

    def __init__(self, source: Path, layout: Layout, **others: Any):
        from modelwright.formats._layout import refuse_folder

        refuse_folder(source, layout)
        self.source, self.layout = source, layout
        super().__init__(**others)
        self._recorded(source)

    def write(self, folder: Path) -> None:
        from modelwright.formats._layout import translate

        translate(self.source, folder, self.layout)

    @property
    def sources(self) -> list[Path]:
        return [self.source]


def open(source: str | Path | Model | nn.Module, *, tokenizer: Any = None, trust_remote_code: bool = False) -> Model:
    """Open a model: a folder, a hub name, a GGUF file, "starter", or a module that is already in memory. Nothing large is read.

    "model+adapter" is the model with the peft adapter in that folder put into its weights. Layers that GPTQ, AWQ or bitsandbytes
    stored become ours, and weights in GGUF dense (see `formats`).

    Raises:
        WeightsError: no checkpoint there, or one that is damaged.
        ModelError: the model's type is unknown, or what stands behind a + is no adapter.
    """
    if isinstance(source, Model):
        return source
    if isinstance(source, nn.Module):
        return Model(name=type(source).__name__, module=source, tokenizer=tokenizer)
    restore(Path(source).absolute())
    if "+" in str(source) and not Path(source).exists():
        base, _, adapter = str(source).rpartition("+")
        if not (Path(adapter) / "adapter_config.json").is_file():
            hint = hub.nearest_path(adapter)
            raise ModelError(f"{source}: {adapter} is no folder with a peft adapter.{hint} Name one behind the +, after the model.")
        return Folded(open(base, tokenizer=tokenizer, trust_remote_code=trust_remote_code), Path(adapter))
    from modelwright.formats import gguf_file

    if file := gguf_file(source):
        from modelwright.formats.gguf_read import Gguf

        return Gguf(file, name=str(source), tokenizer=tokenizer, trust_remote_code=trust_remote_code)
    if str(source) == "starter":
        from modelwright.starter import path

        folder = path()
    elif (Path(source) / "adapter_config.json").is_file():
        folder = Path(source)
    else:
        folder = Checkpoint(source).path
    if (folder / COMPRESSED).is_file():
        raise ModelError(f"{source} is compressed. Write the model that it was with `modelwright.decompress`, and open that.")
    if (folder / "adapter_config.json").is_file():
        return Model(name=str(source), folder=folder, tokenizer=tokenizer, trust_remote_code=trust_remote_code)
    refuse_unknown(folder, trust_remote_code)
    stated = stated_config(folder).get("quantization_config") or {}
    if stated.get("quant_method") not in (None, loading.METHOD, "compressed-tensors"):
        from modelwright.formats import reader

        if layout := reader(stated["quant_method"]):
            return Translated(folder, layout, name=str(source), tokenizer=tokenizer, trust_remote_code=trust_remote_code)
    return Model(name=str(source), folder=folder, tokenizer=tokenizer, trust_remote_code=trust_remote_code)


def check_readable(model: Model) -> None:
    """Read every weight once, slice by slice, before any work.

    Raises:
        WeightsError: a shard is damaged, or weights are NaN or infinite.
    """
    if model.checkpoint is not None:
        check_finite(model.checkpoint)
    else:
        refuse_not_finite(model.name, dict(model.module.named_parameters()))


def refuse_not_finite(model: str, tensors: Mapping[str, Tensor]) -> None:
    """Raise WeightsError where tensors of a model, by their names, hold NaN or infinity."""
    found = {name: value.detach() for name, value in tensors.items() if value.is_floating_point() and not value.is_meta}
    if bad := [name for name, value in found.items() if not_finite(value)]:
        raise WeightsError(f"{model}: {len(bad)} tensors hold NaN or infinity, first {bad[0]}. Start from sound weights.")


def stated_config(folder: Path) -> dict[str, Any]:
    """The content of a model folder's config.json; of its base's, for an adapter.

    Raises:
        ModelError: no config, or one that is no JSON object.
    """
    file = folder / "config.json"
    if not file.is_file():
        adapter = folder / "adapter_config.json"
        if adapter.is_file():
            return stated_config(base_of(adapter))
        raise ModelError(f"{folder} has no config.json, so its architecture is unknown. Copy it from the original model.")
    return read_json(file, ModelError, "Copy it from the original model.")


def refuse_unknown(folder: Path, trust_remote_code: bool = False) -> None:
    """Raise ModelError when neither Modelwright nor transformers knows a folder's model type, or it needs code of its own."""
    stated = stated_config(folder)
    kind = stated.get("model_type")
    if trust_remote_code or anatomy_of(stated).types:
        return
    import transformers

    if kind in transformers.CONFIG_MAPPING:
        return
    if stated.get("auto_map"):
        raise ModelError(f"{folder} runs code of its own. Read that code, then pass --trust-remote-code if you trust it.")
    raise ModelError(
        f"{folder}: transformers {transformers.__version__} knows no model type {kind!r}."
        f"{nearest(str(kind), transformers.CONFIG_MAPPING)} A newer transformers may know it."
    )


def read_config(folder: Path, trust_remote_code: bool = False) -> Any:
    """The transformers config of a checkpoint folder; of its base, for an adapter.

    Raises:
        ModelError: no config, or a model type that transformers does not know.
    """
    if not (folder / "config.json").is_file() and (folder / "adapter_config.json").is_file():
        return read_config(base_of(folder / "adapter_config.json"), trust_remote_code)
    refuse_unknown(folder, trust_remote_code)
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)


def class_of(config: Any) -> type[PreTrainedModel]:
    """The transformers class that the config names; the causal language model of its type when it names none."""
    import transformers

    for name in config.architectures or []:
        found = getattr(transformers, name, None)
        if found is not None:
            return found
    causal: Any = transformers.AutoModelForCausalLM._model_mapping
    plain: Any = transformers.AutoModel._model_mapping
    return causal.get(type(config), None) or plain[type(config)]


def plain_module(config: Any) -> PreTrainedModel:
    """The model that a config makes, with meta tensors and the architecture's own layers."""
    with torch.device("meta"), quiet():
        return class_of(config)._from_config(config)


def empty_module(config: Any) -> PreTrainedModel:
    """The model with meta tensors, and with the layers that its checkpoint describes in place."""
    module = plain_module(config)
    loading.install(module, stated_descriptions(config, module))
    sharing.tie(module, sharing.stated_ties(config))
    return module


def stated_descriptions(config: Any, module: nn.Module | None = None) -> dict[str, dict[str, Any]]:
    """The stored layers that a config speaks of: ours, or the packed ones of compressed-tensors."""
    stated = getattr(config, "quantization_config", None)
    if stated is None:
        return {}
    stated = stated if isinstance(stated, dict) else stated.to_dict()
    if stated["quant_method"] == loading.METHOD:
        return stated["modules"]
    if stated["quant_method"] == "compressed-tensors":
        return loading.translated(stated, module or plain_module(config))
    raise ModelError(f"A checkpoint in the {stated['quant_method']} format cannot be opened yet. Open the unquantised model.")


def load_module(folder: Path, config: Any, trust_remote_code: bool = False, unread: list[str] | None = None) -> nn.Module:
    """The module with its weights; packed layers stay packed; a peft adapter is put on its base.

    What the files have and the module has no place for goes to `unread`.

    Raises:
        ModelError: tensors are missing from the checkpoint, or an adapter is not stored as safetensors.
    """
    adapter = folder / "adapter_config.json"
    if adapter.is_file():
        from peft import PeftConfig, PeftModel

        from .adapters import beside_stored

        refuse_pickled(folder)
        base = load_module(base_of(adapter), config, trust_remote_code, unread)
        with quiet():
            stated = PeftConfig.from_pretrained(str(folder))
            stated.inference_mode = False
            borne: Any = PeftModel.from_pretrained(base, str(folder), is_trainable=True, config=beside_stored(stated))
        for own in borne.peft_config.values():
            if not Path(own.base_model_name_or_path).is_dir() and (place := beside(adapter, own.base_model_name_or_path)):
                own.base_model_name_or_path = str(place)
        return borne
    descriptions, ties = stated_descriptions(config), sharing.stated_ties(config)
    if descriptions or ties:
        config.quantization_config = {"quant_method": loading.METHOD, "modules": descriptions, "ties": ties}
    made: Any = class_of(config)
    with quiet():
        module, found = made.from_pretrained(
            folder, config=config, dtype="auto", output_loading_info=True, trust_remote_code=trust_remote_code,
            local_files_only=True,
        )  # fmt: skip
    lacking = sorted(found["missing_keys"])
    if lacking:
        raise ModelError(f"{folder} lacks {len(lacking)} tensors that its config.json asks for, first {lacking[0]!r}. Fetch it again.")
    if unread is not None:
        unread[:] = sorted(found["unexpected_keys"])
    for attribute in ("hf_quantizer", "is_quantized", "quantization_method"):
        if attribute in vars(module):
            delattr(module, attribute)
    if hasattr(module.config, "quantization_config"):
        del module.config.quantization_config
    return module


def save_module(module: nn.Module, folder: Path) -> None:
    """Write weights and config into an existing folder, in the form that the most tools load."""
    from transformers import PreTrainedModel

    stated = loading.quantization_config(module)
    if isinstance(module, PreTrainedModel):
        write_pretrained(module, folder, stated, sharing.written(module) if stated and "ties" in stated else None)
    elif hasattr(module, "peft_config"):
        with quiet():
            module.save_pretrained(str(folder))  # type: ignore[operator]
    else:
        from safetensors.torch import save_model

        save_model(module, str(folder / "model.safetensors"), metadata={"format": "pt"})


def write_pretrained(module: Any, folder: Path, stated: dict[str, Any] | None, state: dict[str, Tensor] | None) -> None:
    """Write a model of transformers into an existing folder; stated: its `quantization_config`; state: other tensors than its own."""
    if stated:
        module.config.quantization_config = stated
    try:
        with quiet():
            module.save_pretrained(folder, state_dict=state)
    finally:
        if stated:
            del module.config.quantization_config


def unwrapped(module: nn.Module) -> nn.Module:
    """The base model under peft's wrapper; another module as it is."""
    bearer: Any = module
    return bearer.get_base_model() if hasattr(bearer, "get_base_model") else module


def unloaded(module: nn.Module) -> nn.Module:
    """The base model, without the layers of the adapter that it bears; another module as it is."""
    bearer: Any = module
    return bearer.unload() if hasattr(bearer, "get_base_model") else module


def tokenizer_files(folder: Path) -> list[Path]:
    """The tokenizer's and processor's files in a model folder."""
    return [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]


def files_of(model: Model) -> Checkpoint:
    """The files of a model that lies on disk as a whole. Raises ModelError for others."""
    if model.checkpoint is None:
        raise ModelError(f"{model.name} is in memory or an adapter. Save it as a whole model first.")
    return model.checkpoint


def copy_beside(out: Writer, source: Checkpoint) -> None:
    """Write the config and the tokenizer of a checkpoint beside what is being written."""
    out.write_json("config.json", source.config)
    for file in [*tokenizer_files(source.path), source.path / "generation_config.json"]:
        if file.is_file():
            out.copy_file(file)


def weight_of(module: nn.Module, site: Site) -> Tensor | None:
    """The dense weight of a site as [out, in] (experts: [n, out, in]); None where a stored layer stands instead."""
    if isinstance(module.get_submodule(site.module), Stored):
        return None
    weight = tensor_of(module, site.name)
    return weight.T if site.transposed else weight


def tensor_of(module: nn.Module, name: str) -> Tensor:
    """A parameter's values, or a buffer, by its name."""
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path)
    return owner.get_buffer(leaf) if leaf in owner._buffers else owner.get_parameter(leaf).data


def why_not_stored(module: nn.Module, site: Site, planned: Any) -> str:
    """Why the layer that a method plans cannot stand in the place of a site; "" if it can."""
    if not isinstance(planned, Stored):
        return ""
    old = module.get_submodule(site.module)
    if isinstance(old, nn.Embedding) and not planned.lossless and any(site.name in names for names in anatomy_of(module).tied(module)):
        return "is an embedding that is tied to the head, so it stays as it is; leave it out with `skip: embed`"
    return planned.why_not(old)


def put(module: nn.Module, site: Site, result: Tensor | nn.Module) -> None:
    """Put a verb's result in the place of a site's weight: values in place, or a stored layer for every module that uses it."""
    if isinstance(result, Tensor):
        tensor_of(module, site.name).copy_(result.T if site.transposed else result)
        return
    old = module.get_submodule(site.module)
    assert isinstance(result, Stored) and not result.why_not(old), result
    tied = next((names for names in anatomy_of(module).tied(module) if site.name in names), ()) if isinstance(old, nn.Embedding) else ()
    names = tied or sharing.everywhere(module, [site.name])
    paths = [name.rpartition(".")[0] for name in names]
    for path, layer in zip(paths, sharing.copies(result, len(paths)), strict=True):
        stood = module.get_submodule(path)
        layer.take_bias(getattr(stood, "bias", None))
        module.set_submodule(path, layer.standing_for(stood))
        sharing.release(module, path)
    if tied:
        held: Any = module
        held.shares = True


def emptied(module: nn.Module) -> nn.Module:
    """A copy of a module with meta tensors; ties stay ties, and no value is copied."""
    held = [*module.parameters(), *module.buffers()]
    memo: dict[int, Any] = {
        id(value): nn.Parameter(value.detach().to("meta"), requires_grad=value.requires_grad)
        if isinstance(value, nn.Parameter)
        else value.to("meta")
        for value in held
    }
    return copy.deepcopy(module, memo)


def stored_bytes(module: nn.Module) -> int:
    """Bytes of everything that is saved: parameters and persistent buffers, tied ones once."""
    base = unwrapped(module)
    ties = getattr(base, "_tied_weights_keys", None) if getattr(getattr(base, "config", None), "tie_word_embeddings", False) else None
    seen: set[int] = set()
    total = 0
    for name, value in module.state_dict(keep_vars=True).items():
        if id(value) not in seen and name.removeprefix("base_model.model.") not in (ties or ()):
            seen.add(id(value))
            total += value.numel() * value.element_size()
    return total


def refuse_pickled(adapter: Path) -> None:
    """Raise ModelError when the folder of an adapter has no tensors in safetensors."""
    if not (adapter / "adapter_model.safetensors").is_file():
        raise ModelError(f"{adapter} has no adapter_model.safetensors, and pickles are never loaded. Save the adapter as safetensors.")


def base_of(adapter: Path) -> Path:
    """The folder of an adapter's base, by the adapter's adapter_config.json.

    Raises:
        ModelError: it does not name one.
    """
    base = json.loads(adapter.read_text("utf-8")).get("base_model_name_or_path")
    if not base:
        raise ModelError(f"{adapter} does not name its base model. Set base_model_name_or_path in it.")
    return beside(adapter, base) or Checkpoint(base).path


def beside(adapter: Path, base: str) -> Path | None:
    """The base that an adapter names, where it lies there or beside it, also once both have moved; None: on the hub, or nowhere."""
    places = (adapter.parent / base, adapter.parent.absolute() / Path(base).name)
    return next((place for place in places if place.is_dir()), None)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers' own bars and warnings off the screen."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()

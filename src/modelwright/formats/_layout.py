"""Checkpoint folders whose linear layers are stored as another tool does: written from layers of ours, and read into them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from modelwright.blocks._stored import Stored
from modelwright.blocks.experts import SplitExperts
from modelwright.core import loading, sharing
from modelwright.core.errors import ModelError, refuse
from modelwright.core.model import RECORD, Model, plain_module, stated_config, tokenizer_files, unwrapped, write_pretrained
from modelwright.core.weights import Checkpoint, Writer


class Layout(ABC):
    """How a tool stores linear layers, and what it says of them in `config.json`."""

    name: ClassVar[str]  # in errors
    heads: ClassVar[bool] = True  # the head too can be stored so, and not only what lies before it
    markers: ClassVar[tuple[str, ...]]  # what the name of one tensor of each stored layer ends with, after the layer's

    @abstractmethod
    def unfit(self, layer: nn.Module) -> str:
        """Why a layer cannot be stored so, as the end of a sentence; "" if it can."""

    @abstractmethod
    def same(self, layer: Any, rows: bool) -> tuple[Any, ...]:
        """What all layers of a folder must have in common, as values that a user would know; rows: groups are whole rows in all of them."""

    @abstractmethod
    def tensors(self, layer: Any) -> dict[str, Tensor]:
        """What is stored of a layer, but for its bias."""

    @abstractmethod
    def config(self, layer: Any, rows: bool, plain: list[str], head: str) -> dict[str, Any]:
        """The `quantization_config` of a model with layers like this one, and with linears of these names that are stored as they are.

        head: the name of the one that gives logits.
        """

    @abstractmethod
    def refused(self, config: Mapping[str, Any]) -> str:
        """Why a folder with this `quantization_config` cannot be opened, as the end of a sentence; "" if it can."""

    @abstractmethod
    def layer(self, stored: Mapping[str, Tensor], config: Mapping[str, Any], dtype: torch.dtype) -> Stored:
        """A layer from its tensors, for a model of this dtype.

        Raises:
            Unfit: there is no such layer here.
        """

    def dtype(self, dtype: torch.dtype) -> torch.dtype:
        """That of the model that is opened, where a folder says this one."""
        return dtype


def refuse_other_sizes(name: str, module: Any) -> None:
    """Raise ModelError where a module's tensors are not those that its config speaks of, so that no other tool could read them."""
    expected = {path: value.shape for path, value in plain_module(module.config).state_dict().items()}
    found = {path: value.shape for path, value in module.state_dict().items()}
    for path, layer in module.named_modules():
        if isinstance(layer, Stored):
            turned = layer.replaces == "Conv1D"
            found[f"{path}.weight"] = torch.Size((layer.in_features, layer.out_features)[:: 1 if turned else -1])
            if (bias := getattr(layer, "bias", None)) is not None:
                found[f"{path}.bias"] = bias.shape
    if other := [path for path, shape in expected.items() if found.get(path) != shape]:
        raise ModelError(
            f"{name}: {len(other)} tensors, first {other[0]}, are not there, or of other sizes than the config says, and only Modelwright "
            "reads that. Save the model as it is."
        )


class Unfit(Exception):
    """A stored layer is none of ours; the text is the end of a sentence."""


class Folder:
    """A model's folder in a layout, checked and ready to be written."""

    def __init__(self, model: Model, layout: Layout):
        self.model, self.layout = model, layout
        self.module = unwrapped(model.module)
        self.layers = {name: layer for name, layer in self.module.named_modules() if isinstance(layer, Stored)}
        outputs = getattr(self.module, "get_output_embeddings", lambda: None)()
        self.head = next((name for name, layer in self.module.named_modules() if layer is outputs), "lm_head")
        rows = all(getattr(layer, "group", None) is None for layer in self.layers.values())
        self._refuse(rows)
        plain = [name for name, layer in self.module.named_modules() if isinstance(layer, nn.Linear)]
        self.stated = layout.config(next(iter(self.layers.values())), rows, plain, self.head)

    def _refuse(self, rows: bool) -> None:
        name, own = self.model.name, self.layout
        if not hasattr(self.module, "config") or "adapters" in self.model.marks:
            raise ModelError(f"{name}: {own.name} stores models of transformers without an adapter, and this is none. Fold the adapter.")
        if not self.layers:
            raise ModelError(f"{name} has no layer that is stored in fewer bits, as {own.name} does. Quantise it first: quantize.*.")
        if sharing.shared(self.module):
            raise ModelError(f"{name}: blocks share weights, which {own.name} cannot say. Save the model as it is.")
        reasons: dict[str, list[str]] = {}
        for path in loading.described(self.module):
            if (
                why := "gives the logits, and readers take that for dense"
                if path == self.head and not own.heads
                else self._unfit(self.module.get_submodule(path))
            ):
                reasons.setdefault(why, []).append(path)
        refuse(ModelError, [f"{own.name} cannot hold {len(at)} layers, first {at[0]}, which {why}." for why, at in reasons.items()])
        refuse_other_sizes(name, self.module)
        alike: dict[tuple[Any, ...], str] = {}
        for path, layer in self.layers.items():
            alike.setdefault(own.same(layer, rows), path)
        if len(alike) > 1:
            found = "; ".join(f"{path}: {', '.join(map(str, same))}" for same, path in alike.items())
            raise ModelError(f"{name}: {own.name} has one setting for all layers, and found are {found}. Quantise all alike.")

    def _unfit(self, layer: nn.Module) -> str:
        if isinstance(layer, Stored) and layer.replaces == "Linear":
            return self.layout.unfit(layer)
        if isinstance(layer, SplitExperts):
            return "holds experts one by one, and it is written here of models without"
        if isinstance(layer, Stored):
            return f"is a {type(layer).__name__}, in the place of {layer.replaces}"
        return f"is a {type(layer).__name__}, which the architecture does not have"

    def write(self, folder: Path) -> None:
        """Write weights and config into an existing folder."""
        state = {}
        for name, value in self.module.state_dict().items():
            path, _, leaf = name.rpartition(".")
            if path not in self.layers or leaf == "bias":
                state[name] = value
        for path, layer in self.layers.items():
            state |= {f"{path}.{leaf}": value.contiguous() for leaf, value in self.layout.tensors(layer).items()}
        write_pretrained(self.module, folder, self.stated, state)


def refuse_folder(folder: Path, layout: Layout) -> None:
    """Raise ModelError when the config of a folder says what no layer of ours can be."""
    if why := layout.refused(stated_config(folder)["quantization_config"]):
        raise ModelError(f"{folder} is in the {layout.name} format {why}, and cannot be opened yet. Open the unquantised model.")


def translate(folder: Path, out: Path, layout: Layout) -> None:
    """Write a folder of another tool as one of ours, tensor by tensor, with the same codes and scales.

    Raises:
        ModelError: a layer is stored in a way that ours are not.
    """
    config = stated_config(folder)
    stated = config.pop("quantization_config")
    files = Checkpoint(folder)
    named = str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch.")
    before = getattr(torch, named)
    dtype = layout.dtype(before)
    paths = [name.removesuffix(marker) for name in files.names for marker in layout.markers if name.endswith(marker)]
    own: dict[str, list[str]] = {path: [] for path in paths}
    for name in files.names:
        path = next((name[:at] for at, letter in enumerate(name) if letter == "." and name[:at] in own), None)
        if path is not None and name != f"{path}.bias":
            own[path].append(name)
    descriptions: dict[str, dict[str, Any]] = {}
    with Writer(out) as writer:
        for path, names in own.items():
            stored = {name.removeprefix(f"{path}."): files.read(name) for name in names}
            try:
                layer = layout.layer(stored, stated, dtype)
            except Unfit as why:
                raise ModelError(f"{folder}: {path} is in the {layout.name} format, and {why}. Open the unquantised model.") from None
            except KeyError as missing:
                raise ModelError(f"{folder}: {path} lacks its tensor {missing}. Fetch the model again.") from None
            descriptions[path] = layer.describe() | {"bias": f"{path}.bias" in files}
            for leaf, value in layer.state_dict().items():
                writer.add(f"{path}.{leaf}", value)
        done = {name for names in own.values() for name in names}
        for name in files.names:
            if name not in done:
                if files.dtype(name) == before != dtype:
                    writer.add(name, _as(files.read(name), dtype, f"{folder}: {name}"))
                else:
                    writer.copy(name, files)
        config |= {"dtype": str(dtype).removeprefix("torch.")}
        config.pop("torch_dtype", None)
        writer.write_json("config.json", config | {"quantization_config": {"quant_method": loading.METHOD, "modules": descriptions}})
        for file in [*tokenizer_files(folder), folder / "generation_config.json", folder / RECORD]:
            if file.is_file():
                writer.copy_file(file)


def _as(values: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """Values in another dtype. Raises ModelError where one is too large for it, or some would become 0."""
    found = values.to(dtype)
    if not (found.isfinite() == values.isfinite()).all() or not ((found == 0) == (values == 0)).all():
        raise ModelError(f"{name} holds values that {str(dtype).removeprefix('torch.')} cannot. Open the unquantised model.")
    return found

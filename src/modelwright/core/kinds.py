"""Whether models can be merged: of one architecture with the same heads and tensors; and what else differs that no shape shows."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .errors import ModelError, refuse
from .method import Method
from .model import Model, stated_config, unwrapped

# Configs that differ here compute another function of the same tensors.
SIZES = (
    "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "n_embd", "n_head", "d_model", "num_heads", "d_kv",
    "encoder_attention_heads", "decoder_attention_heads",
)  # fmt: skip
ROPE = "rope_parameters"  # where transformers 5 keeps what older configs have as `rope_theta` and `rope_scaling`


@dataclass(frozen=True)
class Kind:
    """What a model is beside its tensors: its config, and its tokens with their ids; None where it has no tokenizer.json."""

    name: str
    config: Mapping[str, Any]
    words: Mapping[str, int] | None = None

    @classmethod
    def of(cls, model: Model) -> Kind:
        """Read from a model's folder, or from its config in memory; no weight is read."""
        if model.folder is None or model.loaded:
            config = model.config.to_dict() if hasattr(model.config, "to_dict") else {}
        else:
            config = stated_config(model.folder)
        return cls(model.name, config, None if model.folder is None else words_in(model.folder))


def words_in(folder: Path) -> dict[str, int] | None:
    """Token -> id by the tokenizer.json in a folder; None where there is none that can be read."""
    try:
        return words_of(json.loads((folder / "tokenizer.json").read_bytes()))
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return None


def words_of(tokenizer: Mapping[str, Any]) -> dict[str, int]:
    """Token -> id, of the content of a tokenizer.json; added tokens too."""
    stated = tokenizer["model"]["vocab"]
    found = dict(stated) if isinstance(stated, dict) else {entry[0]: i for i, entry in enumerate(stated)}
    return found | {entry["content"]: entry["id"] for entry in tokenizer.get("added_tokens") or []}


def refuse_others(first: Kind, others: Sequence[Kind]) -> None:
    """Raise ModelError, with all reasons, unless the others are of the architecture of the first and have its heads."""
    kinds: dict[str, list[str]] = {}
    for one in (first, *others):
        if one.config:
            kinds.setdefault(str(one.config.get("model_type")), []).append(one.name)
    if len(kinds) > 1:
        listed = "; ".join(f"{kind}: {', '.join(names)}" for kind, names in kinds.items())
        raise ModelError(f"Models that are merged must be of one architecture; found {listed}.")
    refuse(ModelError, [
        f"The config of the result comes from {first.name}, with {key} {own[key]}; {other.name} has {stated[key]}. "
        "Merge models of one kind, with one of them as the base."
        for other in others
        for own, stated in _pairs(first.config, other.config)
        for key in SIZES
        if None not in (own.get(key), stated.get(key)) and own[key] != stated[key]
    ])  # fmt: skip


def refuse_unlike(method: Method, models: Sequence[Model]) -> None:
    """Raise ModelError where a method needs models of one kind, and their configs and files show that they are not."""
    if not method.alike or len(models) < 2:
        return
    first, *others = dict.fromkeys(models)
    refuse_others(Kind.of(first), [Kind.of(other) for other in others])
    for other in others:  # tensors that only one of them has may have other names there, which shows when a module is built
        if first.checkpoint and other.checkpoint and not first.loaded and not other.loaded:
            both = [name for name in first.checkpoint if name in other.checkpoint]
            one, two = ({name: model.checkpoint.shape(name) for name in both} for model in (first, other) if model.checkpoint)
            refuse_other_shapes(one, [(other.name, two)])


def refuse_stored(models: Sequence[Model]) -> None:
    """Raise ModelError when layers are stored otherwise than dense: two models' factors or masks are not of one kind."""
    if faults := [model.name for model in models if not model.dense]:
        stored = "layers are stored as factors, masks or packed integers, or share their weights"
        raise ModelError(f"{', '.join(faults)}: {stored}. Work on the dense models together.")
    own: dict[str, torch.dtype] = {}
    for model in models:
        dtypes = (
            {name: model.checkpoint.dtype(name) for name in model.checkpoint.names}
            if model.checkpoint is not None
            else {name: value.dtype for name, value in held(unwrapped(model.module)).items()}
        )
        narrow = [name for name, dtype in dtypes.items() if dtype.is_floating_point and dtype.itemsize < 2]
        if narrow:
            raise ModelError(f"{model.name}: {len(narrow)} tensors have 8 bits, first {narrow[0]}. Merge the models that it was made from.")
        own = own or dtypes
        other = [name for name in own if name in dtypes and own[name].is_floating_point is not dtypes[name].is_floating_point]
        if other:
            both = " and ".join(str(each[other[0]]).removeprefix("torch.") for each in (own, dtypes))
            raise ModelError(
                f"{models[0].name} and {model.name}: {len(other)} tensors are whole numbers in one of them alone, first {other[0]} "
                f"({both}). Merge the models that they were made from."
            )


def refuse_other_shapes(own: dict[str, tuple[int, ...]], donors: Sequence[tuple[str, dict[str, tuple[int, ...]]]]) -> None:
    """Raise ModelError, naming every difference, unless all donors have the tensors of the model in its shapes."""
    faults = []
    for name, shapes in donors:
        missing = [tensor for tensor in own if tensor not in shapes]
        more = [tensor for tensor in shapes if tensor not in own]
        other = [tensor for tensor in own if tensor in shapes and shapes[tensor] != own[tensor]]
        if missing or more:
            faults.append(f"{name} lacks {len(missing)} tensors and has {len(more)} others, first {(missing + more)[0]}")
        if other:
            faults.append(f"{name}: {len(other)} tensors have other shapes, first {other[0]}: {shapes[other[0]]} against {own[other[0]]}")
    if faults:
        raise ModelError("Models that are worked on together must have the same tensors. " + "; ".join(faults) + ".")


def held(module: nn.Module) -> dict[str, Tensor]:
    """Name -> tensor of what a model's files hold: parameters, and buffers such as the running statistics of norms; ties once."""
    stored = set(module.state_dict())
    buffers = {name: value for name, value in module.named_buffers() if name in stored}
    return {name: value.data for name, value in module.named_parameters()} | buffers


def differences(first: Kind, others: Sequence[Kind], *, words: bool = True) -> list[str]:
    """Sentences on positions, and on `words`, that differ from those of the first, whose config and tokenizer the result has."""
    notes = []
    for other in others:
        for own, stated in _pairs(first.config, other.config):
            one, two = _rope(own), _rope(stated)
            notes += [
                f"{other.name} has {key} {two[key]}, and {first.name} has {one[key]}, which the result keeps"
                for key in one
                if key in two and one[key] != two[key]
            ]
        if words and first.words is not None and other.words is not None and first.words != other.words:
            odd = dict(first.words.items() ^ other.words.items())
            notes.append(
                f"{other.name} and {first.name} have vocabularies that differ in {len(odd):,} tokens, such as {min(odd)!r}; rows are "
                "merged by their number. A configuration with tokenizer_source merges them by token"
            )
    return notes


def _pairs(one: Mapping[str, Any], two: Mapping[str, Any]) -> Iterator[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    """Two configs, and the configs of their parts that both have."""
    yield one, two
    for key, inner in one.items():
        if isinstance(inner, dict) and isinstance(two.get(key), dict) and key.endswith("_config"):
            yield inner, two[key]


def _rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a config says of rotary positions, whichever transformers wrote it; {} where it says nothing."""
    stated = dict(config.get(ROPE) or config.get("rope_scaling") or {})
    if config.get("rope_theta") is not None:
        stated.setdefault("rope_theta", config["rope_theta"])
    if stated and not any(isinstance(value, dict) for value in stated.values()):
        stated["rope_type"] = stated.pop("type", None) or stated.get("rope_type", "default")
    return stated

"""Adapters as plain LoRA, which any peft loads on the unchanged model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from modelwright.blocks._part import dense_of, transposed
from modelwright.core.adapters import Update, Whole, config_for, read
from modelwright.core.errors import ModelError, SettingError
from modelwright.core.files import refuse_existing, refuse_inputs, whole_folder
from modelwright.core.model import Model, open, unwrapped
from modelwright.maths.low_rank import change_factors, rounding


@dataclass(frozen=True)
class Exported:
    """What was written: the folder, and by layer the rank and the share of the change's size that is missing."""

    folder: Path
    ranks: Mapping[str, int]
    errors: Mapping[str, float]


@torch.no_grad()
def export_adapter(model: Any, save: str | Path, *, rank: float | None = None, base: Any = None, overwrite: bool = False) -> Exported:
    """Write the adapter on a model as a LoRA of scale 1, which plain peft loads.

    model: a model that bears an adapter, a module or a folder. rank: of each layer at most, a whole number; or the share of the change's
    square that is to be held, below 1; by default all. base: the model that the LoRA is to be loaded on, where the adapter stands on
    weights that have changed since: what changed in its layers becomes part of the LoRA. Modules that train whole go along.

    Raises:
        ModelError: a layer's adapter is no change of its weight alone, or the base differs elsewhere.
        SettingError: the rank is no rank and no share.
    """
    if rank is not None and not (rank >= 1 and rank == int(rank) or 0 < rank < 1):
        raise SettingError(f"rank is a whole number of at least 1, or a share between 0 and 1; got {rank}.")
    opened, folder = open(model), Path(save)
    refuse_existing(folder, overwrite=overwrite)
    refuse_inputs(folder, opened.sources)
    if opened.rebased and base is None:
        raise ModelError(f"The weights under the adapter on {opened.name} have changed. Name the model that they were: base=...")
    updates, whole = _updates(opened)
    layers: dict[str, Any] = dict(unwrapped(opened.module).named_modules())
    weights = {path: dense_of(layers[path].get_base_layer())[0].detach() for path in updates}
    if base is not None:
        updates = _with_shifts(updates, weights, opened, open(base))
    made, errors = {}, {}
    for path, update in updates.items():
        made[path], errors[path] = _within(update, rank)
    turned = all(transposed(layers[path].get_base_layer()) for path in made)
    with whole_folder(folder, overwrite=overwrite) as partial:
        _write(partial, made, whole, turned, _base(opened) if base is None else open(base).name)
    return Exported(folder, {path: update.rank for path, update in made.items()}, errors)


def _updates(model: Model) -> tuple[dict[str, Update], Whole]:
    """What the active adapter of a model adds to its linear layers, by their paths, and the modules that it trains whole."""
    from peft.utils import ModulesToSaveWrapper

    from modelwright.core.tuners import Bearer, TunerConfig

    module: Any = model.module
    if not hasattr(module, "peft_config"):
        raise ModelError(f"{model.name} bears no adapter. Name a folder of one, or attach one with adapt.lora.")
    active = list(module.active_adapters)
    config = module.peft_config.get(active[0]) if len(active) == 1 else None
    if not isinstance(config, TunerConfig):
        return read(model)
    updates, whole, strange = {}, {}, []
    for path, layer in unwrapped(model.module).named_modules():
        if isinstance(layer, ModulesToSaveWrapper):
            whole[path] = {key: value.detach() for key, value in layer.modules_to_save[active[0]].state_dict().items()}
        if not isinstance(layer, Bearer) or active[0] not in layer.parts:
            continue
        part, (weight, bias) = layer.parts[active[0]], dense_of(layer.get_base_layer())
        changed = part.merged(weight.float(), bias) if part.mergeable and weight.ndim == 2 else None
        if changed is None or _differ(changed[1], bias):
            strange.append(path)
        elif (factors := part.factors()) is not None:
            updates[path] = Update(*factors)
        else:
            updates[path] = _factored(changed[0] - weight.float(), rounding(weight.float()))
    if strange:
        raise ModelError(
            f"{model.name}: what its adapter does to {len(strange)} layers, first {strange[0]}, is no change of a matrix alone, which is "
            "all that LoRA can be. Put it into the weights with adapt.fold, or keep it as it is."
        )
    return updates, whole


def _differ(one: Tensor | None, other: Tensor | None) -> bool:
    return one is not other and (one is None or other is None or not torch.equal(one, other))


def _factored(change: Tensor, floor: float) -> Update:
    up, down, _ = change_factors(change.float(), min(change.shape), floor=floor)
    return Update(up, down)


def _with_shifts(updates: dict[str, Update], weights: Mapping[str, Tensor], model: Model, base: Model) -> dict[str, Update]:
    """The updates with what has changed in their layers since the base."""
    own = {
        name.replace(".base_layer", "").replace(".original_module", ""): value
        for name, value in unwrapped(model.module).state_dict().items()
    }
    before = unwrapped(base.module)
    for name, value in before.state_dict().items():
        if name.removesuffix(".weight") not in updates and not (name in own and torch.equal(own[name], value)):
            raise ModelError(f"{name} of {base.name} differs from that of {model.name}, and bears no adapter. Name another base.")
    found = {}
    for path, update in updates.items():
        first = dense_of(before.get_submodule(path))[0].detach()
        if first.shape != weights[path].shape:
            raise ModelError(f"{path} of {base.name} is of another shape than that of {model.name}. Name another base.")
        shift = _factored(weights[path].float() - first.float(), rounding(first))
        found[path] = Update(torch.cat([update.up.float(), shift.up], 1), torch.cat([update.down.float(), shift.down]), update.bias)
    return found


def _within(update: Update, rank: float | None) -> tuple[Update, float]:
    """An update with the rank, or the share of its square, that is asked for; and the share of its size that is missing."""
    up, down = update.up.detach().float(), update.down.detach().float()
    if rank is None or rank >= update.rank:
        return Update(up, down, update.bias), 0.0
    change = up @ down
    most, keep = (min(change.shape), rank) if rank < 1 else (int(rank), 1.0)
    up, down, held = change_factors(change, most, keep)
    return Update(up, down, update.bias), max(0.0, 1 - held) ** 0.5


def _write(folder: Path, updates: Mapping[str, Update], whole: Whole, turned: bool, base: str) -> None:
    """The two files of a LoRA adapter of scale 1."""
    if odd := [path for path, update in updates.items() if update.bias is not None]:
        raise ModelError(f"The adapter moves the bias of {odd[0]}, which plain LoRA does not. Put it into the weights with adapt.fold.")
    tensors = {f"base_model.model.{path}.{key}": value for path, values in whole.items() for key, value in values.items()}
    for path, update in updates.items():
        up, down = update.up, update.down
        if not update.rank:  # of a layer that has not changed, which peft wants a row of all the same
            up, down = up.new_zeros(len(up), 1), down.new_zeros(1, down.shape[1])
        tensors |= {f"base_model.model.{path}.lora_A.weight": down, f"base_model.model.{path}.lora_B.weight": up}
    ranks = {path: max(1, update.rank) for path, update in updates.items()}
    config = config_for(ranks, whole, fan_in_fan_out=turned, base_model_name_or_path=base, inference_mode=True)
    config.save_pretrained(str(folder))
    stored = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    save_file(stored, folder / "adapter_model.safetensors", {"format": "pt"})


def _base(model: Model) -> str:
    """The name of the model that an adapter says it stands on."""
    configs: Any = getattr(model.module, "peft_config", {})
    return next((config.base_model_name_or_path for config in configs.values() if config.base_model_name_or_path), "") or model.name

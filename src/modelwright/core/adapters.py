"""Low-rank adapters of peft as plain factors: read from a model that bears one, and put on a model as one."""

from __future__ import annotations

import contextlib
import copy
import functools
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from modelwright.anatomy import Site, Units, anatomy_of
from modelwright.anatomy.removal import remove_units, selections, state_biases
from modelwright.blocks._part import Part
from modelwright.blocks._stored import Stored
from modelwright.blocks.bottlenecks import Activation
from modelwright.blocks.reparametrised import Reparametrised

from .errors import ModelError
from .files import read_json, write_json
from .model import Model, quiet, save_module, unwrapped


@dataclass(frozen=True)
class Update:
    """What an adapter adds to a layer: up [out, r] · down [r, in], and a bias [out]. An embedding's `in` is its tokens.

    sparse: what it adds beside the product [out, in], where that was asked for.
    """

    up: Tensor
    down: Tensor
    bias: Tensor | None = None
    sparse: Tensor | None = None

    @property
    def rank(self) -> int:
        return self.up.shape[1]

    def change(self, sparse: bool = True) -> Tensor:
        """All of it [out, in], float32; or without the sparse part."""
        product = self.up.float() @ self.down.float()
        return product if self.sparse is None or not sparse else product + self.sparse.float()


Whole = dict[str, dict[str, Tensor]]  # path of a module -> its tensors


def read(model: Model, sparse: bool = False) -> tuple[dict[str, Update], Whole]:
    """The updates of a model's adapter by the path of their layers, scales multiplied in; and the modules that it saves whole.

    Adapters of ours count where their parts are low-rank updates and nothing else.
    sparse: also those with a sparse part, such as of adapt.dsee.

    Raises:
        ModelError: several adapters are active, or one is more than low-rank updates of linears and embeddings.
    """
    from peft.tuners.lora import LoraLayer
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

    from .tuners import Bearer

    active = list(cast(Any, model.module).active_adapters) if hasattr(model.module, "peft_config") else []
    if len(active) != 1:
        raise ModelError(f"{model.name} has {len(active)} active adapters; one is needed. Name the folder of one.")
    name = active[0]
    updates: dict[str, Update] = {}
    whole: Whole = {}
    strange = []
    for path, layer in unwrapped(model.module).named_modules():
        if isinstance(layer, ModulesToSaveWrapper):
            whole[path] = {key: value.detach() for key, value in layer.modules_to_save[name].state_dict().items()}
        if isinstance(layer, BaseTunerLayer) and not isinstance(layer, LoraLayer):
            part = layer.parts[name] if isinstance(layer, Bearer) and name in layer.parts else None
            if isinstance(layer, Bearer) and part is None:
                continue
            changes = change_of(part, sparse) if isinstance(part, Part) else None
            if changes is None or isinstance(layer.get_base_layer(), nn.modules.conv._ConvNd):
                strange.append(path)
            else:
                updates[path] = changes
            continue
        if not isinstance(layer, LoraLayer) or name not in layer.scaling:
            continue
        scale = layer.scaling[name]
        if name in layer.lora_embedding_A:
            updates[path] = Update(layer.lora_embedding_B[name].detach() * scale, layer.lora_embedding_A[name].detach())
        elif isinstance(layer.lora_A[name], nn.Linear) and not layer.lora_variant and layer.__class__.__name__ in ("Linear", "StoredLora"):
            back: Any = layer.lora_B[name]
            bias = None if back.bias is None else back.bias.detach() * scale
            updates[path] = Update(back.weight.detach() * scale, cast(Tensor, layer.lora_A[name].weight).detach(), bias)
        else:
            strange.append(path)
    if strange or not (updates or whole):
        found = f"{len(strange)} of its layers are otherwise, first {strange[0]}" if strange else "it has none of them"
        raise ModelError(f"{model.name}: only low-rank updates of linears and embeddings can be read; {found}. Fold it with adapt.fold.")
    return updates, whole


@dataclass(frozen=True)
class Trained:
    """The bottlenecks U φ(D h) of an adapter on disk, by the paths of their layers: U [out, r] with scales in it, and D [r, in].

    They stand `beside` layers, so that h is what these are given, or `after` them.
    """

    pairs: dict[str, tuple[Tensor, Tensor]]
    activation: Activation
    side: Literal["beside", "after"]


def trained(folder: str) -> Trained:
    """A LoRA adapter, or one of `adapt.parallel` or `adapt.series`, as it lies in a folder of peft's.

    Raises:
        ModelError: no adapter lies there, it is of another kind, or has more than these.
    """
    file = Path(folder) / "adapter_model.safetensors"
    if not file.is_file():
        raise ModelError(f"{folder} has no adapter_model.safetensors. Name the folder of a trained adapter.")
    now = file.stat()
    return _trained(folder, now.st_mtime_ns, now.st_size, now.st_ino)


@functools.lru_cache(maxsize=8)
def _trained(folder: str, *_: int) -> Trained:
    """The same, once for a file as it is now: each layer asks for it."""
    from peft.utils.other import get_pattern_key
    from safetensors.torch import load_file

    file = Path(folder) / "adapter_model.safetensors"
    stated = read_json(Path(folder) / "adapter_config.json", ModelError, "Save the adapter again.")
    kind = str(stated.get("peft_type")).upper()
    names = {"LORA": r"lora_([AB])\.weight"} | {ours: rf"{ours.lower()}_parts\.bottleneck\.(down|up)" for ours in ("PARALLEL", "SERIES")}
    if kind not in names or stated.get("use_dora"):
        raise ModelError(f"{folder} holds a {kind} adapter, and sources are LoRA, adapt.parallel or adapt.series.")
    found: dict[str, list[Tensor | None]] = {}
    for key, value in load_file(file).items():
        name = re.fullmatch(rf"base_model\.model\.(.+)\.{names[kind]}", key)
        if name is None or value.ndim != 2:
            raise ModelError(f"{folder} has {key}, which is no low-rank update and no bottleneck, so that it cannot be a source.")
        found.setdefault(name[1], [None, None])[name[2] in ("B", "up")] = value
    pairs = {}
    for path, (down, up) in found.items():
        assert down is not None
        assert up is not None
        scale = stated.get("by_layer", {}).get(path, {}).get("scale", stated.get("scale", 1.0))
        if kind == "LORA":
            patterns: dict[str, float] = stated.get("alpha_pattern") or {}
            alpha: float = patterns.get(get_pattern_key(list(patterns), path), stated["lora_alpha"])
            scale = alpha / (len(down) ** 0.5 if stated.get("use_rslora") else len(down))
        pairs[path] = up * scale, down
    return Trained(pairs, stated.get("activation", "none"), "after" if kind == "SERIES" else "beside")


@functools.cache
def _stored_bearer() -> type[nn.Module]:
    """The class of LoRA's layer around one of ours that is stored in another form."""
    from peft.tuners.lora.layer import Linear

    class StoredLora(Linear):
        def __init__(self, base_layer: Any, adapter_name: str, config: Any, **others: Any):
            config.fan_in_fan_out = base_layer.replaces == "Conv1D"  # as peft sets it where the layer is dense
            super().__init__(base_layer, adapter_name, config, **others)

        def merge(self, *args: Any, **kwargs: Any) -> None:
            if isinstance(self.get_base_layer(), Stored):
                raise ModelError("An update cannot go into a packed weight, which would be rounded anew. Use quantize.dequantize first.")
            super().merge(*args, **kwargs)

    return StoredLora


def change_of(part: Part, sparse: bool) -> Update | None:
    """What a part of ours adds to a weight, where it does nothing else; with `sparse` also beside its low rank."""
    if sparse and isinstance(part, Reparametrised) and part.additive and part.scatter is not None:
        rows, columns = part.scatter.shape
        up, down = (torch.zeros(rows, 0), torch.zeros(0, columns)) if part.update is None else part.update.factors()
        return Update(up.detach(), down.detach(), None, part.scatter.change().detach())
    factors = part.factors()
    return None if factors is None else Update(factors[0].detach(), factors[1].detach())


def beside_stored(config: Any) -> Any:
    """The config of an adapter, which from now on also knows layers that are stored in another form than a dense matrix."""
    if hasattr(config, "_register_custom_module"):
        config._register_custom_module({Stored: _stored_bearer()})
    return config


def bearing(site: Site) -> str:
    """The path of the layer that bears an update beside a site's weight; "" where there is none."""
    return site.module.removesuffix(".base_layer") if site.module.endswith(".base_layer") else ""


def nothing(layer: Any) -> Update:
    """An update of rank 1 that changes nothing."""
    rows, columns = layer.weight.shape if isinstance(layer, nn.Linear) else layer.weight.shape[::-1]
    return Update(torch.zeros(rows, 1), torch.zeros(1, columns))


def attach(module: nn.Module, updates: Mapping[str, Update], whole: Whole) -> nn.Module:
    """The module with an adapter of these updates, each of its own rank and scale 1, and copies of these modules.

    Patterns of ranks name whole paths, so that layers of one name in two blocks may differ. Biases need all layers to
    have one. Ranks of 0 are left out. A head that is tied to an embedding follows its copy.
    """
    import peft

    tied = tied_ends(module)
    follows = tied is not None and tied[0] in whole
    if tied and follows and tied[0].rpartition(".")[2] != "embed_tokens":  # the only name that peft ties by itself
        whole, follows = {**whole, tied[1]: {"weight": whole[tied[0]]["weight"]}}, False
    kept = {path: update for path, update in updates.items() if update.rank}
    if not kept:  # peft wants a layer at least
        first = next((path, layer) for path, layer in module.named_modules() if type(layer).__name__ in ("Linear", "Conv1D"))
        kept = {first[0]: nothing(first[1])}
    config = config_for(
        {path: update.rank for path, update in kept.items()}, whole, ensure_weight_tying=follows,
        lora_bias=any(update.bias is not None for update in kept.values()),
    )  # fmt: skip
    with quiet(), torch.random.fork_rng():
        wrapped = peft.get_peft_model(module, config)  # type: ignore[arg-type]
    layers: dict[str, Any] = dict(unwrapped(wrapped).named_modules())
    with torch.no_grad():
        for path, update in kept.items():
            layer = layers[path]
            if "default" in layer.lora_embedding_A:
                layer.lora_embedding_A["default"].copy_(update.down)
                layer.lora_embedding_B["default"].copy_(update.up)
                continue
            layer.lora_A["default"].weight.copy_(update.down)
            layer.lora_B["default"].weight.copy_(update.up)
            if layer.lora_B["default"].bias is not None:
                layer.lora_B["default"].bias.copy_(torch.zeros(len(update.up)) if update.bias is None else update.bias)
        for path, tensors in whole.items():
            layers[path].modules_to_save["default"].load_state_dict(tensors)
    return wrapped.eval()


def config_for(ranks: Mapping[str, int], whole: Whole, **others: Any) -> Any:
    """peft's config of LoRA with ranks of layers by their whole paths, a scale of 1, and modules that train whole."""
    import peft

    highest = max(ranks.values())
    lower = {path: rank for path, rank in ranks.items() if rank != highest}
    return peft.LoraConfig(
        r=highest, lora_alpha=highest, rank_pattern=lower, alpha_pattern=dict(lower), target_modules=list(ranks),
        modules_to_save=list(whole) or None, **others,
    )  # fmt: skip


def tied_ends(module: nn.Module) -> tuple[str, str] | None:
    """The paths of the embedding and the head, if they share their weight."""
    ends: list[Any] = [getattr(module, way, lambda: None)() for way in ("get_input_embeddings", "get_output_embeddings")]
    if None in ends or ends[0].weight is not ends[1].weight:
        return None
    paths = {id(layer): path for path, layer in module.named_modules()}
    return paths[id(ends[0])], paths[id(ends[1])]


def takes_biases(module: nn.Module, paths: list[str]) -> bool:
    """Whether all these layers have a bias, without which peft cannot put one of an update into the weights."""
    layers = [module.get_submodule(path) for path in paths]
    return all(getattr(layer, "bias", None) is not None and not isinstance(layer, nn.Embedding) for layer in layers)


@contextlib.contextmanager
def plain_layers(base: nn.Module) -> Iterator[dict[str, Any]]:
    """A model's own layers in the places of those that bear an adapter; these, by their paths, are put back afterwards."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

    kinds = (BaseTunerLayer, ModulesToSaveWrapper)
    bearers: dict[str, Any] = {path: layer for path, layer in base.named_modules() if isinstance(layer, kinds)}
    for path, layer in bearers.items():
        base.set_submodule(path, layer.original_module if isinstance(layer, ModulesToSaveWrapper) else layer.get_base_layer())
    try:
        yield bearers
    finally:
        for path, layer in bearers.items():
            base.set_submodule(path, layer)


@torch.no_grad()
def without_units(bearers: Mapping[str, Any], found: Sequence[Units], kept: Sequence[Sequence[int]]) -> None:
    """Take from LoRA's factors and our parts, by the paths of their layers, the rows and columns of units that leave the layers.

    Raises:
        ModelError: a layer bears an adapter that has no such rows and columns.
    """
    from peft.tuners.lora import LoraLayer
    from peft.utils import ModulesToSaveWrapper

    for path, layer in bearers.items():
        own = getattr(layer, "parts", None)
        whole = own is not None and all(part.selectable for part in own.values())
        if not whole and not isinstance(layer, (LoraLayer, ModulesToSaveWrapper)):
            raise ModelError(f"{path} bears an adapter whose rows and columns cannot leave with units. Fold it with adapt.fold first.")
    bearers = {path: layer for path, layer in bearers.items() if not isinstance(layer, ModulesToSaveWrapper)}
    chosen = selections(list(found), kept)
    for path, layer in bearers.items():
        transposed = type(layer.get_base_layer()).__name__ == "Conv1D"
        parts = getattr(layer, "parts", None)
        for dim, factors in enumerate((layer.lora_B, layer.lora_A) if parts is None else ({}, {})):
            rows = chosen.get((f"{path}.weight", 1 - dim if transposed else dim))
            for part in (parts or {}).values() if rows is not None else ():
                part.select(dim, torch.tensor(rows, device=next(part.parameters()).device))
            for factor in factors.values() if rows is not None else ():
                for name, value in factor.named_parameters(recurse=False):
                    if name == "weight" or dim == 0:
                        index = torch.tensor(rows, device=value.device)
                        setattr(factor, name, nn.Parameter(value.index_select(dim if name == "weight" else 0, index), value.requires_grad))
                factor.out_features, factor.in_features = factor.weight.shape
            if rows is not None:
                setattr(layer, ("out_features", "in_features")[dim], len(rows))


def factors_of(layer: Any) -> tuple[Any, Any]:
    """A [r, in] and B [out, r] of the one plain LoRA update on a layer.

    Raises:
        ModelError: it bears something else.
    """
    downs, ups = (list(getattr(layer, name, {}).values()) for name in ("lora_A", "lora_B"))
    if len(downs) != 1 or len(ups) != 1 or not isinstance(downs[0], nn.Linear):
        raise ModelError(f"A {type(layer).__name__} bears no plain LoRA update, or several. Attach adapt.lora alone, to linear layers.")
    return downs[0].weight, ups[0].weight


def ranks_of(bearers: Mapping[str, Any]) -> dict[str, int]:
    """The rank of each LoRA update, by the path of its layer."""
    return {path: len(factors_of(layer)[0]) for path, layer in bearers.items() if not hasattr(layer, "original_module")}


@torch.no_grad()
def shrink(base: Any, found: Sequence[Units], kept: Sequence[Sequence[int]], ranks: Mapping[str, Sequence[int]]) -> str:
    """Take units that do not stay out of a model and of the LoRA updates on it, and of these all but some ranks; in place.

    base: the model under the adapter. ranks: what stays of each update, by the path of its layer; without any the layer bears none.
    What stays of units goes to the config, `units_kept`: kind -> scope -> indices in the first model that lost some.
    Gives why plain transformers could not load the model, "" where it can.
    """
    why, config = "", getattr(base, "config", None)
    before: dict[str, Any] = copy.deepcopy(getattr(config, "units_kept", {}))
    with plain_layers(base) as bearers:
        without_units({path: layer for path, layer in bearers.items() if path in ranks}, found, kept)
        for kind in dict.fromkeys(units.kind for units in found):
            own = {units.scope: list(rows) for units, rows in zip(found, kept, strict=True) if units.kind == kind}
            every = anatomy_of(base).units(base, kind)
            rows = [own.get(units.scope, list(range(units.count))) for units in every]
            why = remove_units(base, kind, rows, plain=False).why_not_plain or why
            held = before.setdefault(kind, {})
            held |= {scope: [held[scope][row] for row in rows] if scope in held else rows for scope, rows in own.items()}
    if config is not None and before:
        config.units_kept = before
    _keep_ranks(base, ranks)
    return why


def _keep_ranks(base: Any, ranks: Mapping[str, Sequence[int]]) -> None:
    """Keep of LoRA updates these rows of A and columns of B, and let the config say so."""
    (name, config), patterns = next(iter(base.peft_config.items())), dict[str, tuple[int, float]]()
    for path, stays in ranks.items():
        layer = base.get_submodule(path)
        if not stays:
            base.set_submodule(path, layer.get_base_layer())
            continue
        for dim, factor in enumerate((layer.lora_A[name], layer.lora_B[name])):
            index = torch.tensor(stays, device=factor.weight.device)
            factor.weight = nn.Parameter(factor.weight.index_select(dim, index), factor.weight.requires_grad)
            factor.out_features, factor.in_features = factor.weight.shape
        layer.r[name], layer.lora_alpha[name] = len(stays), layer.scaling[name] * len(stays)
        patterns[path] = len(stays), layer.lora_alpha[name]
    config.target_modules, config.use_rslora = set(patterns), False
    config.rank_pattern = {path: rank for path, (rank, _) in patterns.items()}
    config.alpha_pattern = {path: alpha for path, (_, alpha) in patterns.items()}


@torch.no_grad()
def restored(model: Model, original: nn.Module) -> nn.Module:
    """The original of a model that lost units, with the model's adapter: 0 in the rows and columns of what was lost.

    Raises:
        ModelError: the adapter is no plain LoRA.
    """
    updates, whole = read(model)
    kept: dict[str, dict[str, list[int]]] = getattr(unwrapped(model.module).config, "units_kept", {})
    found = [units for kind in kept for units in anatomy_of(original).units(original, kind) if units.scope in kept[kind]]
    chosen, wide = selections(found, [kept[units.kind][units.scope] for units in found]), {}

    def spread(values: Tensor, dim: int, path: str, transposed: bool) -> Tensor:
        rows = chosen.get((f"{path}.weight", 1 - dim if transposed else dim))
        if rows is None:
            return values
        sizes = list(values.shape)
        sizes[dim] = original.get_parameter(f"{path}.weight").shape[1 - dim if transposed else dim]
        return values.new_zeros(sizes).index_copy(dim, torch.tensor(rows, device=values.device), values)

    for path, update in updates.items():
        turned = type(original.get_submodule(path)).__name__ == "Conv1D"
        bias = None if update.bias is None else spread(update.bias, 0, path, turned)
        wide[path] = Update(spread(update.up, 0, path, turned), spread(update.down, 1, path, turned), bias)
    return attach(original, wide, whole)


def folded(bearer: Any) -> tuple[nn.Module, str]:
    """The model with its active adapters put into its weights, and why plain transformers cannot load it, "" when it can.

    Raises:
        ModelError: one is no change of weights, or would go into a packed one.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    found = {path: layer for path, layer in unwrapped(bearer).named_modules() if isinstance(layer, BaseTunerLayer)}
    for path, layer in found.items():
        parts = getattr(layer, "parts", {})
        if fixed := [parts[name] for name in layer.active_adapters if name in parts and not parts[name].mergeable]:
            raise ModelError(f"{path} bears a {type(fixed[0]).__name__}, which is no change of a weight. Keep the adapter beside it.")
    bare = [path for path, layer in found.items() if getattr(layer.get_base_layer(), "bias", None) is None]
    empty = any(value.is_meta for value in bearer.parameters())
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*gains one")  # it is stated below
        module = bearer.merge_and_unload(safe_merge=not empty)
    biased = [path for path in bare if getattr(module.get_submodule(path), "bias", None) is not None]
    return module, state_biases(module, biased) if biased else ""


def save_base(bearer: nn.Module, folder: Path, final: Path) -> None:
    """Write the model under an adapter into `base` beside the adapter's files in `folder`, which will be `final`."""
    (folder / "base").mkdir()
    base = unwrapped(bearer)
    with plain_layers(base):
        save_module(base, folder / "base")
    file = folder / "adapter_config.json"
    stated = read_json(file, ModelError, "Save the adapter again.")
    others = {"base_seen": None} if "base_seen" in stated else {}  # its weights are no longer those that it was made on
    write_json(file, stated | {"base_model_name_or_path": str(final.absolute() / "base")} | others)

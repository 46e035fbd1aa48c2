"""Take blocks, neurons, heads, channels and experts out of a model for good.

What is left is a smaller model of the same class with a config that says so: no masks, no zeros. The weights that stay
keep their values, except that with fewer channels the norms are scaled, because they average over fewer.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from modelwright.core.errors import PlanError, SiteError, refuse

from ._base import Anatomy, Branch, Units, head_width, is_residual_norm, refuse_turned
from ._find import anatomy_of

BY_BLOCK = ("layer_types", "mlp_layer_types", "no_rope_layers")  # lists in configs with an entry per block


@dataclass(frozen=True)
class Removed:
    """What a removal left."""

    kind: str
    before: tuple[int, ...]  # units of each entry of `Anatomy.units`, or blocks
    after: tuple[int, ...]
    why_not_plain: str = ""  # why plain transformers cannot load the result; "" when it can

    @property
    def plain(self) -> bool:
        """Whether the result, saved, loads in plain transformers."""
        return not self.why_not_plain


def remove_blocks(module: Any, drop: Iterable[int], stack: str | None = None) -> Removed:
    """Take the blocks `drop` out of the model, in place.

    Blocks and their cache places are numbered anew, and the config's count and lists by block follow.

    `stack` is the dotted path of the list of blocks, for models that have more than one (T5, CLIP).

    Raises: SiteError for a model without one list of blocks or a block that it lacks; PlanError when none would stay.
    """
    anatomy = anatomy_of(module)
    refuse_turned(module)
    stacks = anatomy.stack_paths(module)
    if stack is None:
        if len(stacks) != 1:
            raise SiteError(
                f"blocks can leave one list of blocks; this {anatomy.name} model has {len(stacks)}"
                + (f": say which with stack=, one of {', '.join(stacks)}" if stacks else "")
            )
        stack = stacks[0]
    elif stack not in stacks:
        raise SiteError(f"{stack!r} is no list of blocks of this model; it has {', '.join(stacks) or 'none'}")
    blocks = list(module.get_submodule(stack))
    drop = set(drop)
    if strange := sorted(drop - set(range(len(blocks)))):
        raise SiteError(f"no block {strange[0]}: {stack} has blocks 0 to {len(blocks) - 1}")
    kept = [n for n in range(len(blocks)) if n not in drop]
    if not kept:
        raise PlanError(f"all {len(blocks)} blocks of {stack} would go; keep one or more")
    if drop:
        _set_blocks(module, anatomy, stack, kept)
    return Removed("blocks", (len(blocks),), (len(kept),))


def _set_blocks(module: Any, anatomy: Anatomy, stack: str, kept: list[int]) -> None:
    parent, _, name = stack.rpartition(".")
    old = module.get_submodule(stack)
    before = list(old)
    anatomy.blocks_left(module, stack, kept, before)
    blocks = [before[n] for n in kept]
    new_list = nn.ModuleList(blocks) if isinstance(old, nn.ModuleList) else nn.Sequential(*blocks)
    setattr(module.get_submodule(parent), name, new_list)
    for config in _configs(module, stack):
        if "num_hidden_layers" in anatomy.stacks.values():
            config.num_hidden_layers = len(kept)
        for key in BY_BLOCK:
            values = getattr(config, key, None)
            if isinstance(values, (list, tuple)) and len(values) == len(before):
                setattr(config, key, [values[n] for n in kept])
    number_slots(module, stack)


def number_slots(module: Any, stack: str) -> None:
    """Give every attention of the blocks its place in the cache.

    Where all blocks have one, the place is the block's number. Else those of a kind (`layer_types`) have the first places of
    their kind: a cache is asked for its length at its first place.
    """
    anatomy = anatomy_of(module)
    kinds = _kinds(module, stack)
    free = {kind: [n for n, other in enumerate(kinds) if other == kind] for kind in set(kinds)}
    for number, block in enumerate(module.get_submodule(stack)):
        slot = free[kinds[number]].pop(0) if _attends(anatomy, f"{stack}.{number}", block) else number
        for child in block.modules():
            if isinstance(getattr(child, "layer_idx", None), int):
                child.layer_idx = slot
                resized = {*getattr(child, "resized", ()), "layer_idx"} - ({"layer_idx"} if slot == number else set())
                if resized or hasattr(child, "resized"):
                    child.resized = sorted(resized)
                if not getattr(child, "resized", True):
                    del child.resized


def keeps_slot(module: Any, gone: Sequence[Branch]) -> bool:
    """Whether, without these branches, an attention is left of the kind of the cache's first place."""
    anatomy = anatomy_of(module)
    stack = anatomy.blocks(module)
    if stack is None or not any(isinstance(getattr(child, "layer_idx", None), int) for child in module.modules()):
        return True
    kinds = _kinds(module, stack)
    left = [branch for branch in anatomy.branches(module) if branch.kind == "attn" and branch not in gone]
    return kinds[0] in {kinds[branch.depth] for branch in left}


def _kinds(module: Any, stack: str) -> list[str]:
    """The kind of attention of each block, as the config has it; "" for all where it has none."""
    count = len(module.get_submodule(stack))
    kinds: Any = next((found for config in _configs(module, stack) if (found := getattr(config, "layer_types", None))), [])
    return list(kinds) if len(kinds) == count else [""] * count


def _attends(anatomy: Anatomy, path: str, block: nn.Module) -> bool:
    """Whether a block has an attention."""
    names = [name for name, _ in (*block.named_modules(), *block.named_parameters())]
    return any((anatomy.role(f"{path}.{name}") or ("",))[0].startswith("attn.") for name in names)


def remove_units(
    module: Any,
    kind: str,
    keep: Sequence[int] | Sequence[Sequence[int]] | Mapping[int, Sequence[int]],
    *,
    plain: bool = True,
) -> Removed:
    """Keep only the units `keep` of a kind, in place: one of `_base.KINDS`.

    `keep` are the indices that stay: one list for all, a list for each entry of `Anatomy.units` in its order, or a map
    from a block's index to its list (blocks that it leaves out keep all). A head is a key-value head with its query
    heads. The model then computes what it would with the other units' outputs set to zero; for experts, what it would
    if the router could not choose them.

    With `plain`, a result that plain transformers could not load is refused before anything changes. Without, the
    record says why it could not; the config stays as it is, and the model loads after `import modelwright`.

    Raises: SiteError for units that the model lacks; PlanError for a result that cannot be, with the choices that can.
    """
    anatomy = anatomy_of(module)
    found = anatomy.units(module, kind)
    kept = _kept(found, keep)
    after = tuple(len(rows) for rows in kept)
    before = tuple(units.count for units in found)
    if before == after:
        return Removed(kind, before, after)
    if kind == "experts" and min(after) < module.config.num_experts_per_tok:
        raise PlanError(f"each token goes to {module.config.num_experts_per_tok} experts; {min(after)} would stay")
    why_not = _why_not_plain(module, anatomy, found, kept)
    if why_not and plain:
        choices = _choices(module, anatomy, found, after)
        raise PlanError(f"{why_not}. {choices}With plain=False it is stored in a way that loads after `import modelwright`.")

    changes = (
        []
        if why_not or kind in ("channels", "stages")
        else [(_configs(module, units.scope), _changes(module, anatomy, units, max(after))) for units in found]
    )
    ratio = before[0] / after[0]
    tensors: dict[str, torch.Tensor] = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    heads = [(_attentions(module, units), _repeat(module, units)) for units in found if kind == "heads"]
    if why_not:
        for attention in {attention for attentions, _ in heads for attention in attentions if hasattr(attention, "config")}:
            attention.config = copy.copy(attention.config)  # some read there how many heads they have
    with resizing(module, mark=bool(why_not)):
        with torch.no_grad():
            for (name, dim), rows in selections(found, kept).items():
                weight = tensors[name]
                weight.data = weight.data.index_select(dim, torch.tensor(rows, device=weight.device))
                weight.grad = None
        for (attentions, repeat), count in zip(heads, after, strict=False):
            _set_heads(attentions, count, repeat)
            if why_not:
                for attention in filter(lambda one: hasattr(one, "config"), attentions):
                    _set_config(attention.config, {"num_attention_heads": count * repeat, "num_key_value_heads": count})
        for config, keys in [(config, keys) for configs, keys in changes for config in configs]:
            _set_config(config, keys)
        if kind == "residual":
            with torch.no_grad():
                _scale_norms(module, anatomy, found[0], ratio)
    return Removed(kind, before, after, why_not)


@contextlib.contextmanager
def resizing(module: nn.Module, *, mark: bool = True) -> Iterator[None]:
    """Tensors take other shapes inside; then modules know their sizes, and with `mark` what of them the config does not say."""
    sizes = {child: _sizes(child) for child in module.modules()}
    yield
    for child in module.modules():
        _set_sizes(child)
    for child, known in sizes.items() if mark else ():
        now = _sizes(child)
        if changed := {name for name in now if now[name] != known.get(name)}:
            child.resized = sorted(changed.union(getattr(child, "resized", ())))  # type: ignore[assignment]


def lower_experts_per_token(module: Any, count: int) -> None:
    """Let routers send each token to `count` experts where they send it to more."""
    for child in (module.config, *module.modules()):
        names = ["num_experts_per_tok", *(["top_k"] if child is not module.config else [])]
        for name in names:
            if isinstance(vars(child).get(name), int):
                setattr(child, name, min(vars(child)[name], count))


def give_biases(module: Any, biases: Mapping[str, torch.Tensor]) -> str:
    """Add to the biases of layers, by their paths [out], or give them biases where they have none.

    Returns why plain transformers cannot load the result, "" when it can.
    """
    layers = {path: module.get_submodule(path) for path in biases}
    with torch.no_grad():
        for path, layer in layers.items():
            weight = layer.weight
            if layer.bias is None:
                layer.bias = nn.Parameter(weight.new_zeros(len(biases[path])))
            layer.bias.copy_(layer.bias.double() + biases[path].double())
    return state_biases(module, list(layers))


def state_biases(module: Any, paths: Sequence[str]) -> str:
    """Let a model's config say of layers that they have biases, which these have; the other layers that it then gives biases take zeros.

    Where no config can (`attention_bias`, `mlp_bias`), the layers are marked, so that files say it.
    Returns why plain transformers cannot load the result, "" when it can.
    """
    missing = _missing_biases(module) if hasattr(module, "config") else None
    for path in paths:
        mark_bias(module.get_submodule(path), missing is None)
    if missing is None:
        return f"{type(getattr(module, 'config', module)).__name__} cannot say that {paths[0]} has a bias"
    for path, like in missing.items():
        module.get_submodule(path).bias = nn.Parameter(like.new_zeros(like.shape[0]))
    return ""


def mark_bias(layer: Any, changed: bool = True) -> None:
    """Let a layer know whether its bias is one that its config does not make."""
    resized = {*getattr(layer, "resized", ())} - {"bias"} | ({"bias"} if changed else set())
    if resized:
        layer.resized = sorted(resized)
    elif hasattr(layer, "resized"):
        del layer.resized


def _missing_biases(module: Any) -> dict[str, torch.Tensor] | None:
    """The layers without a bias that get one from the config once it says that there are biases, with their weights.

    The config then says so. None where no config makes just the module's tensors and those biases.
    """
    own = {name: value.shape for name, value in module.named_parameters()}
    keys = [key for key in ("attention_bias", "mlp_bias") if hasattr(module.config, key)]
    for chosen in itertools.chain.from_iterable(itertools.combinations(keys, count) for count in range(len(keys) + 1)):
        trial = copy.deepcopy(module.config)
        for key in chosen:
            setattr(trial, key, True)
        with torch.device("meta"):
            built = {name: value.shape for name, value in type(module)(trial).named_parameters()}
        more = [name for name in built if name not in own]
        if all(name.endswith(".bias") for name in more) and {name: built[name] for name in built if name not in more} == own:
            for key in chosen:
                setattr(module.config, key, True)
            paths = [name.removesuffix(".bias") for name in more]
            return {path: module.get_submodule(path).weight for path in paths}
    return None


def _kept(found: list[Units], keep: Any) -> list[list[int]]:
    """The kept indices of each entry, sorted, all mistakes said at once."""
    if isinstance(keep, Mapping):
        unknown = sorted(set(keep) - {units.depth for units in found})
        if unknown:
            raise SiteError(f"blocks {unknown} have no {found[0].kind}")
        lists = [keep.get(units.depth, range(units.count)) for units in found]
    else:
        keep = list(keep)
        lists = keep if keep and not isinstance(keep[0], int) else [keep] * len(found)
    if len(lists) != len(found):
        raise SiteError(f"{len(lists)} lists of {found[0].kind} to keep were given; this model has {len(found)} places")
    reasons, kept = [], []
    for units, rows in zip(found, lists, strict=True):
        rows = sorted({int(row) for row in rows})
        place = f"{units.kind} of {units.scope or 'the model'}"
        if not rows:
            reasons.append(f"{place}: none would stay; keep one or more")
        elif rows[0] < 0 or rows[-1] >= units.count:
            wrong = rows[0] if rows[0] < 0 else rows[-1]
            reasons.append(f"{place}: there is no {wrong}, they are 0 to {units.count - 1}")
        kept.append(rows)
    refuse(SiteError, reasons)
    return kept


def selections(found: list[Units], kept: Sequence[Sequence[int]]) -> dict[tuple[str, int], list[int]]:
    """For each tensor and dimension that changes, the positions that stay."""
    spans: dict[tuple[str, int], list[tuple[int, int, Sequence[int]]]] = {}
    for units, rows in zip(found, kept, strict=True):
        for span in (*units.spans, *units.buffers):
            spans.setdefault((span.name, span.dim), []).append((span.start, span.width, rows))
    return {
        key: [start + row * width + n for start, width, rows in sorted(each) for row in rows for n in range(width)]
        for key, each in spans.items()
    }


def _sizes(child: nn.Module) -> dict[str, Any]:
    """The shapes of a module's own parameters, and the numbers that it knows of itself."""
    held = itertools.chain(child.named_parameters(recurse=False), child.named_buffers(recurse=False))
    shapes = {name: tuple(value.shape) for name, value in held if name not in child._non_persistent_buffers_set}
    numbers = {name: value for name, value in vars(child).items() if isinstance(value, (int, float)) and not isinstance(value, bool)}
    config = vars(child.config) if hasattr(child, "config") else {}
    counts = {f"config.{name}": config[name] for name in ("num_attention_heads", "num_key_value_heads") if name in config}
    return shapes | counts | {name: value for name, value in numbers.items() if not name.startswith("_")}


def _set_sizes(child: Any) -> None:
    """Let a module's own record of its sizes follow its weights."""
    weight: Any = getattr(child, "weight", None)
    if isinstance(child, nn.Linear):
        child.out_features, child.in_features = weight.shape
    elif isinstance(child, nn.Embedding):
        child.num_embeddings, child.embedding_dim = weight.shape
    elif isinstance(child, nn.modules.conv._ConvNd):
        if child.groups == 1:
            child.in_channels, child.out_channels = weight.shape[:2] if child.transposed else weight.shape[:2][::-1]
        elif child.groups == child.in_channels == child.out_channels:
            child.groups = child.in_channels = child.out_channels = len(weight)
    elif isinstance(child, nn.modules.batchnorm._NormBase):
        child.num_features = next((len(held) for held in (weight, child.running_mean) if held is not None), child.num_features)
    elif type(child).__name__ == "Conv1D":
        child.nx, child.nf = weight.shape
    elif type(child).__name__.endswith("TopKRouter"):
        child.num_experts, child.hidden_dim = weight.shape
    elif isinstance(getattr(child, "down_proj", None), nn.Parameter):
        child.num_experts, child.hidden_dim, child.intermediate_dim = child.down_proj.shape


def _set_heads(attentions: list[Any], count: int, repeat: int) -> None:
    """Let attention modules know how many heads they have."""
    for attention in attentions:
        inner = count * repeat * head_width(attention)
        sizes = {"num_key_value_heads": count, "inner_dim": inner, "all_head_size": inner, "split_size": inner}
        sizes |= dict.fromkeys(("num_heads", "num_attention_heads", "n_heads"), count * repeat)
        for name in sizes.keys() & vars(attention).keys():
            setattr(attention, name, sizes[name])


def _attentions(module: Any, units: Units) -> list[Any]:
    """The attention modules whose heads these are."""
    paths = {span.name.rsplit(".", 2)[0] for span in units.spans if not span.output}
    return [module.get_submodule(path) for path in sorted(paths)]


def _repeat(module: Any, units: Units) -> int:
    """Query heads for each key-value head."""
    width = head_width(_attentions(module, units)[0])
    return next(span.width for span in units.spans if span.output) // width


def _changes(module: Any, anatomy: Anatomy, units: Units, count: int) -> dict[str, Any]:
    """What the config says once `count` units stay; the width of a head is always said."""
    if units.kind == "heads":
        width = head_width(_attentions(module, units)[0])
        return {
            "num_attention_heads": count * _repeat(module, units),
            "num_key_value_heads": count,
            "head_dim": width,
        }
    if units.kind == "residual":
        heads = anatomy._heads(module)[0]
        eps = getattr(module.config, anatomy.norm_eps) * units.count / count
        return {"hidden_size": count, anatomy.norm_eps: eps, "head_dim": head_width(_attentions(module, heads)[0])}
    return {units.size: count}


def _set_config(config: Any, changes: Mapping[str, Any]) -> None:
    for key, value in changes.items():
        if key != "num_key_value_heads" or hasattr(config, key):
            setattr(config, key, value)


def _scale_norms(module: Any, anatomy: Anatomy, units: Units, ratio: float) -> None:
    """Make up for norms that average over D′ channels instead of D; `ratio` is D/D′.

    Their weights take √ratio and eps takes ratio. A config has one eps, so that norms of queries and keys, which keep
    their width, take the new eps too: their inputs, the queries and keys, then take √ratio, which leaves them as they
    were.
    """
    untouched = anatomy.channels_left(module, ratio)
    channels = {span.name for span in units.spans if not span.output}
    normed = any(not is_residual_norm(name) for name, _ in module.named_parameters())
    for name, weight in module.named_parameters():
        role = (anatomy.role(name) or ("",))[0]
        if role == "norm" and name in channels - untouched:
            weight.copy_((weight.float() + anatomy.norm_offset) * ratio**0.5 - anatomy.norm_offset)
        elif normed and role in ("attn.q", "attn.k"):
            weight.mul_(ratio**0.5)
    for child in module.modules():
        for name in ("variance_epsilon", "eps"):
            if "norm" in type(child).__name__.lower() and isinstance(getattr(child, name, None), float):
                setattr(child, name, getattr(child, name) * ratio)


def _configs(module: Any, scope: str) -> list[Any]:
    """The distinct configs that a scope's modules build on."""
    path, found = scope, []
    while True:
        config = getattr(module.get_submodule(path), "config", None)
        if config is not None:
            found.append(config)
            break
        if not path:
            break
        path = path.rpartition(".")[0]
    inner = module.get_submodule(path)
    found += [child.config for child in inner.modules() if hasattr(child, "config")]
    if type(found[0]) is type(module.config):
        found.append(module.config)
    return list({id(config): config for config in found if type(config) is type(found[0])}.values())


def _why_not_plain(module: Any, anatomy: Anatomy, found: list[Units], kept: Sequence[Sequence[int]]) -> str:
    """Why plain transformers could not load the result, found by building it on the meta device; "" when it can."""
    if found[0].kind in ("channels", "stages"):
        return f"{type(module.config).__name__} has no number for these channels" if hasattr(module, "config") else ""
    sizes: dict[tuple[int, str], set[int]] = {}
    for units, rows in zip(found, kept, strict=True):
        sizes.setdefault((id(_configs(module, units.scope)[0]), units.size), set()).add(len(rows))
    if uneven := next((counts for counts in sizes.values() if len(counts) > 1), None):
        counts = ", ".join(map(str, sorted(uneven)))
        return f"{found[0].kind} would differ between blocks ({counts}), which no config can say"
    if not hasattr(module, "config"):
        return ""
    copies: dict[int, Any] = {}
    trial = copy.deepcopy(module.config, copies)
    for units, rows in zip(found, kept, strict=True):
        for config in _configs(module, units.scope):
            if id(config) in copies:
                _set_config(copies[id(config)], _changes(module, anatomy, units, len(rows)))
    try:
        with torch.device("meta"):
            built = type(module)(type(trial).from_dict(trial.to_dict()))
    except Exception as error:  # whatever a config or a model class objects to is the reason
        return f"{type(module.config).__name__} refuses it: {' '.join(str(error).split())}".rstrip(".")
    wanted = {name: list(weight.shape) for name, weight in module.named_parameters()}
    for (name, dim), rows in selections(found, kept).items():
        wanted[name][dim] = len(rows)
    for name, weight in built.named_parameters():
        if wanted.get(name, list(weight.shape)) != list(weight.shape):
            shapes = f"{name} would be {wanted[name]}, plain transformers makes {list(weight.shape)}"
            return f"{type(module.config).__name__} cannot say it: {shapes}"
    return ""


def _choices(module: Any, anatomy: Anatomy, found: list[Units], after: Sequence[int]) -> str:
    """The nearest counts that plain transformers can load."""
    most, asked = max(units.count for units in found), max(after)
    tried = sorted(range(1, most), key=lambda count: (abs(count - asked), count))[:32]
    works = [count for count in tried if not _why_not_plain(module, anatomy, found, [range(count)] * len(found))]
    return f"Counts that load: {', '.join(map(str, sorted(works)[:8]))}. " if works else ""

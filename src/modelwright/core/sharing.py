"""Weights that several places of a model use: one tensor in memory, once in the files.

In memory, sharing is the same `nn.Parameter`, or the same buffer, under several names; torch then sums the gradients of all
uses and counts it once. A checkpoint holds the tensor under the first name, and `quantization_config` has the others:
`ties: {alias: name}`. What the architecture ties by itself, such as a head to the embedding, is not among them.

A step that changes the values at one place changes them at all. One that stores a shared matrix in another form puts the new
layer at all places, again with one set of tensors and each place's own bias.
"""

from __future__ import annotations

import contextlib
import copy
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from .errors import ModelError


def shared(module: nn.Module) -> dict[str, str]:
    """{alias: name} of the tensors that stand under several names in a model in which some were tied by `tie`."""
    bearer: Any = module
    base: Any = bearer.get_base_model() if hasattr(bearer, "get_base_model") else bearer
    if not getattr(base, "shares", False):  # so that nothing is looked for in other models
        return {}
    own = base.get_expanded_tied_weights_keys(all_submodels=True) if hasattr(base, "get_expanded_tied_weights_keys") else {}
    first: dict[int, str] = {}
    found = {}
    for name, value in base.state_dict(keep_vars=True).items():
        source = first.setdefault(id(value), name)
        if source != name and name.replace(".base_layer.", ".") not in own:
            found[name] = source
    return found


def tie(module: nn.Module, ties: Mapping[str, str]) -> None:
    """Let each alias be the tensor of that name."""
    bearer: Any = module
    bearer.shares = bool(ties) or getattr(module, "shares", False)
    for alias, name in ties.items():
        held, leaf = _held(module, name)
        value = held[leaf]
        path, _, leaf = alias.rpartition(".")
        owner: Any = module.get_submodule(path)
        if leaf in owner._non_persistent_buffers_set:  # nothing, see `leave_out`
            owner._non_persistent_buffers_set.discard(leaf)
            del owner._buffers[leaf]
        (owner._parameters if isinstance(value, nn.Parameter) else owner._buffers)[leaf] = value


def release(module: nn.Module, path: str) -> None:
    """Have the architecture no longer tie the weight of the layer at `path`, which is stored in another form."""
    part, inside = module, f"{path}.weight"
    for name in path.split("."):  # the modules that the layer lies in, which alone can name it
        for record in ("_tied_weights_keys", "all_tied_weights_keys"):
            ties = getattr(part, record, None)
            if isinstance(ties, dict) and (inside in ties or inside in ties.values()):
                setattr(part, record, {alias: source for alias, source in ties.items() if inside not in (alias, source)})
        part, inside = part.get_submodule(name), inside.removeprefix(f"{name}.")


def leave_out(module: nn.Module, ties: Mapping[str, str]) -> None:
    """Have nothing under the aliases until they are tied, so that whoever fills the model neither misses nor makes them."""
    for alias in ties:
        held, leaf = _held(module, alias)
        value = held.pop(leaf)
        owner = module.get_submodule(alias.rpartition(".")[0])
        owner.register_buffer(leaf, value.detach().new_empty(0, *value.shape[1:]), persistent=False)


def stated_ties(config: Any) -> dict[str, str]:
    """{alias: name} by the `quantization_config` of a config; {} where it says nothing."""
    stated = getattr(config, "quantization_config", None) or {}
    stated = stated if isinstance(stated, dict) else stated.to_dict()
    return dict(stated.get("ties") or {})


def written(module: nn.Module) -> dict[str, Tensor]:
    """The state dict of a model without its aliases, for its files."""
    aliases = shared(module)
    return {name: value for name, value in module.state_dict().items() if name not in aliases}


def untie(module: nn.Module) -> None:
    """Give every place values of its own, so that any tool can write and read the model."""
    for alias in shared(module):
        held, leaf = _held(module, alias)
        own = held[leaf].detach().clone()
        held[leaf] = nn.Parameter(own, requires_grad=held[leaf].requires_grad) if isinstance(held[leaf], nn.Parameter) else own


def uses(module: nn.Module) -> Counter[str]:
    """By its first name, at how many places each shared tensor is used; 0 for one that is not shared."""
    aliases = shared(module)
    found = Counter(aliases.values())
    return found + Counter(set(aliases.values()))


def everywhere(module: nn.Module, names: Iterable[str]) -> list[str]:
    """These tensors' names, each followed by the other names that it has."""
    aliases = shared(module)
    return [each for name in names for each in (name, *(alias for alias, source in aliases.items() if source == name))]


def layers(module: nn.Module, names: Iterable[str]) -> list[str]:
    """The paths of all layers that use these tensors."""
    return [name.rpartition(".")[0] for name in everywhere(module, names)]


def remarks(what: str, module: nn.Module, names: Iterable[str]) -> list[str]:
    """What the user should know when matrices are worked on by the inputs of one place, and are used at others too."""
    places = uses(module)
    several = [name for name in names if places[name]]
    if not several:
        return []
    rest = f"first {several[0]}; what it does to them is by the inputs of their first place"
    return [f"{what} changed {len(several)} matrices that several places share, {rest}"]


def copies(layer: nn.Module, count: int) -> list[Any]:
    """So many layers, the first this one, with the same tensors in all."""
    same: dict[int, Any] = {id(value): value for value in (*layer.parameters(), *layer.buffers())}
    return [layer, *(copy.deepcopy(layer, dict(same)) for _ in range(count - 1))]


def _held(module: nn.Module, name: str) -> tuple[dict[str, Any], str]:
    """Where a module holds the tensor of this name, and under which key.

    Raises:
        ModelError: it has none.
    """
    path, _, leaf = name.rpartition(".")
    with contextlib.suppress(AttributeError):
        owner: Any = module.get_submodule(path)
        for held in (owner._parameters, owner._buffers):
            if leaf in held:
                return held, leaf
    raise ModelError(f"Tensors are said to share {name!r}, which the model does not have. Fetch the model again.")

"""Models of which one file holds all sizes: matrices in terms, of which first ones are loaded until a budget of bytes is full.

The terms of all matrices beyond the first of each stand in one order, the universal stack of BitStack (Wang et al. 2024,
arXiv:2410.23918, section 3.2), which `quantization_config` keeps as the places of each layer's terms. A smaller model has a prefix of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from modelwright.blocks.bit_stack import PARTS, BitStackLinear
from modelwright.maths.signed_low_rank import Signed

from . import sharing
from .budget import Budget
from .errors import ModelError, PlanError
from .model import Model, open, stated_config, stated_descriptions, stored_bytes, unwrapped
from .weights import Checkpoint


class Stack(NamedTuple):
    """A matrix in terms, which stands at one place or, shared, at several."""

    name: str  # of its first layer, under which files have it
    layers: list[BitStackLinear]
    places: list[int]  # of all terms that there are, but the first

    @property
    def step(self) -> int:
        """The bytes of a term."""
        return sum(value.nbytes for value in self.layers[0].empty("meta"))


def stacks(module: nn.Module, places: Mapping[str, Sequence[int]] | None = None) -> list[Stack]:
    """The matrices in terms of a module; places: of files that may have more terms of them than are in memory, by name."""
    found: dict[int, Stack] = {}
    for path, layer in module.named_modules():
        if isinstance(layer, BitStackLinear):
            name = path.removesuffix(".base_layer")  # where an adapter stands beside it
            own = max(layer.places, list((places or {}).get(name, ())), key=len)
            found.setdefault(id(layer.get_buffer(f"{PARTS[0]}_0")), Stack(name, [], own)).layers.append(layer)
    return list(found.values())


def sizes(module: nn.Module, found: Sequence[Stack]) -> tuple[int, int]:
    """The bytes of the module with one term of each matrix, and with all."""
    least = stored_bytes(module) - sum(stack.step * (stack.layers[0].terms - 1) for stack in found)
    return least, least + sum(stack.step * len(stack.places) for stack in found)


def lengths(module: nn.Module, found: Sequence[Stack], budget: Budget) -> list[int]:
    """How many terms of each matrix a budget takes: one, then more in the order of their places while all fit.

    Raises:
        PlanError: one of each is too much.
    """
    total, _ = sizes(module, found)
    if total > budget.bytes:
        raise PlanError(
            f"A budget of {budget.text} is {budget.bytes:,} bytes, and the least that this model can have is {total:,}: one term of each "
            "matrix, and what always is in memory. Ask for that or more."
        )
    taken = [1] * len(found)
    for _, number in sorted((place, number) for number, stack in enumerate(found) for place in stack.places):
        if (total := total + found[number].step) > budget.bytes:
            break
        taken[number] += 1
    return taken


def shorten(module: nn.Module, budget: str | int | float, whole: int) -> None:
    """Take from memory the terms that a budget has no room for; a share is of `whole` bytes."""
    found = stacks(module)
    for stack, terms in zip(found, lengths(module, found, Budget.parse(budget, whole)), strict=True):
        for layer in stack.layers:
            layer.keep(terms)


def resize(model: str | Path | Model | nn.Module, budget: str | int | float) -> Any:
    """Have as many terms of a model of `encode.bitstack` in memory as fit a budget; only those that are lacking are read.

    model: a folder, a `Model`, or a module, which has no files, so that what goes from it is gone. budget: of all its tensors, "300MB",
    a number of bytes, "40%" of what the files hold or "2x" smaller.

    Returns the `Model`, or the module if one came in. Raises PlanError when one term of each matrix is more than the budget, which
    names the least, and ModelError for a model that is not stored in terms.
    """
    opened = open(model)
    skeleton = unwrapped(opened.skeleton())
    stated = _places(opened)
    found = stacks(skeleton, stated)
    if not found:
        raise ModelError(f"{opened.name} has no matrix that is stored in terms, so it has one size. Store them with encode.bitstack.")
    taken = lengths(skeleton, found, Budget.parse(budget, sizes(skeleton, found)[1]))
    if not opened.loaded:
        _load(opened, skeleton, found, taken)
    else:
        files = Checkpoint(opened.stored_in) if stated else None
        for stack, terms in zip(found, taken, strict=True):
            _grow(stack, terms, files)
            for layer in stack.layers:
                layer.keep(terms)
    opened.changed = True
    return opened.module if isinstance(model, nn.Module) else opened


def _places(model: Model) -> dict[str, list[int]]:
    """By the names of layers, the places of all terms that a model's files hold; {} where it has none."""
    if model.folder is None:
        return {}
    described = (stated_config(model.folder).get("quantization_config") or {}).get("modules") or {}
    return {name: text["places"] for name, text in described.items() if text["kind"] == BitStackLinear.kind}


def _load(model: Model, skeleton: nn.Module, found: Sequence[Stack], taken: Sequence[int]) -> None:
    """Read a model with so many terms of each matrix, and no others."""
    descriptions, ties = stated_descriptions(model.config), sharing.stated_ties(model.config)
    before = set(skeleton.state_dict())
    for stack, terms in zip(found, taken, strict=True):
        for layer in stack.layers:
            layer.keep(terms)
    left = before - set(skeleton.state_dict())
    descriptions |= {name: layer.describe() for name, layer in skeleton.named_modules() if isinstance(layer, BitStackLinear)}
    ties = {alias: name for alias, name in ties.items() if alias not in left}
    model.config.quantization_config = {"quant_method": "modelwright", "modules": descriptions, "ties": ties}
    model.module.eval()  # which reads it; then it is known what has no place in it
    model.unread = [name for name in model.unread if name not in left]


def _grow(stack: Stack, terms: int, files: Checkpoint | None) -> None:
    """Read the terms up to this number that are not in memory."""
    first = stack.layers[0]
    for number in range(first.terms, terms):
        assert files is not None, "terms beyond those in memory are known from files alone"
        device = first.get_buffer(f"{PARTS[0]}_0").device
        term = Signed(*(files.read(f"{stack.name}.{part}_{number}").to(device) for part in PARTS))
        for layer in stack.layers:
            layer.add(term, stack.places[number - 1])

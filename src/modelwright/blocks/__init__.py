"""Layers that store what they claim: packed integers, two factors, a sparse layout; and what stands for a part that is gone.

Each file holds one layer, and the file's name is its kind. A layer has `describe()`, a JSON object from which `build`
makes an empty one; its state dict is exactly what is stored. One that stands for a matrix also has `dense()`, the weight,
and `stored_bytes()`. One that stands inside another module and changes what that one computes is a guest.
"""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules
from typing import Any

import torch

from modelwright.blocks._stored import Described
from modelwright.core.errors import ModelError, nearest


def class_of(description: dict[str, Any]) -> type[Described]:
    """The class of the layer that `describe()` spoke of; `Described` for kinds that are the work of `core.loading`."""
    kind = description.get("kind")
    if kind not in kinds():
        return Described
    items = vars(import_module(f"{__name__}.{kind}")).values()
    found = (item for item in items if isinstance(item, type) and issubclass(item, Described) and vars(item).get("kind") == kind)
    return next(found, Described)


def kinds() -> list[str]:
    """The kinds of layers, each a file here."""
    return [module.name for module in iter_modules(__path__) if not module.name.startswith("_")]


def build(
    description: dict[str, Any],
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Described:
    """An empty layer from what `describe()` said of one, ready for its state dict.

    dtype: of the floating-point tensors. device: "meta" gives the sizes without the memory.
    Raises ModelError when the kind is unknown or the description does not fit it.
    """
    kind = description.get("kind")
    if kind not in kinds():
        found = f"A layer of kind {kind!r} was asked for; known are {', '.join(kinds())}."
        raise ModelError(found + nearest(str(kind), kinds()))
    try:
        return class_of(description).from_description(description, dtype, device)
    except TypeError as error:
        raise ModelError(f"A layer of kind {kind!r} cannot be made from {description}: {error}.") from error

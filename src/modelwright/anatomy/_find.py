"""Find a model's family by listing the files of this folder."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ._base import Anatomy


@functools.cache
def families() -> tuple[type[Anatomy], ...]:
    """All families, in the order of their files' names."""
    found = []
    for path in sorted(Path(__file__).parent.glob("*.py")):
        if path.name.startswith("_") or path.stem in ("removal", "reorder"):
            continue
        file = importlib.import_module(f"{__package__}.{path.stem}")
        found += [
            value
            for value in vars(file).values()
            if isinstance(value, type) and issubclass(value, Anatomy) and value.__module__ == file.__name__
        ]
    return tuple(found)


@functools.cache
def roles() -> tuple[str, ...]:
    """All roles that some family gives, sorted."""
    return tuple(sorted({role for family in families() for role in family.roles.values()}))


@functools.cache
def _by_type() -> dict[str, Anatomy]:
    return {model_type: family() for family in families() for model_type in family.types}


def anatomy_of(model: Any) -> Anatomy:
    """The anatomy of a module, a transformers config, a config.json as a mapping, or a model type.

    A model of no known family gets the generic anatomy: its linears, convolutions and embeddings. That needs the
    module itself; from a config alone the generic anatomy knows no name.
    """
    config = getattr(model, "config", model)
    model_type: Any
    if isinstance(config, str):
        model_type = config
    elif isinstance(config, Mapping):
        model_type = config.get("model_type")
    else:
        model_type = getattr(config, "model_type", None)
    known = _by_type().get(model_type or "")
    if known is not None:
        return known
    from .generic import GenericAnatomy

    return GenericAnatomy(model if hasattr(model, "named_parameters") else None)

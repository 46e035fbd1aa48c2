"""Modules of compiled loops, which need numba, or triton for accelerators; whoever calls them can do without."""

from __future__ import annotations

import functools
import importlib
from typing import Any


@functools.cache
def kernels(name: str) -> Any:
    """The module of this folder with that name; None where what compiles it is missing."""
    try:
        return importlib.import_module(f"modelwright.maths.{name}")
    except ImportError:
        return None

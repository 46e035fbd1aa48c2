"""How the loops of this folder are compiled by numba: they run beside each other, without Python's lock."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import njit


def compiled(function: Callable[..., Any], **options: Any) -> Any:
    """The function compiled, and kept on disk for the next process where there is a place for it."""
    try:
        return njit(nogil=True, cache=True, **options)(function)
    except RuntimeError:  # neither the package's folder nor the user's can be written
        return njit(nogil=True, **options)(function)

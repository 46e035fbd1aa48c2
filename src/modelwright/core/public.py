"""Modules that are also functions: `modelwright.fit` is the file of `fit` and can be called as it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any


def callable_module(name: str, function: Callable[..., Any]) -> None:
    """Let the module `name` be called as `function`, which bears the same name in the package."""

    class CallableModule(ModuleType):
        __doc__ = function.__doc__

        def __call__(self, *arguments: Any, **named: Any) -> Any:
            return function(*arguments, **named)

    sys.modules[name].__class__ = CallableModule

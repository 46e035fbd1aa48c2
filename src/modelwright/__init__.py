"""Modelwright: give it a model and a budget; get back the best model that fits, and a measured account of the price.

    import modelwright as mw

    mw.fit("starter", budget="40%", save="small/")

The names below load what they need when first used: importing this package loads neither torch nor transformers.
Once transformers is loaded, it reads models that Modelwright saved; once peft is, it knows our adapters.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "open": "core.model",
    "Model": "core.model",
    "apply": "core.walk",
    "starter": "starter",
    "corpus": "core.data",
    "run": "core.recipe",
    "Recipe": "core.recipe",
    "plan": "core.plan",
    "measure": "core.measure",
    "fit": "fit",
    "compare": "compare",
    "merge": "mergekit",
    "compress": "compression",
    "decompress": "compression",
    "pack_delta": "deltas",
    "unpack_delta": "deltas",
    "pack_tasks": "tasks",
    "unpack_task": "tasks",
    "export_c": "c_code",
    "export": "formats",
    "export_adapter": "formats.lora",
    "resize": "core.resizing",
    "kivi_cache": "caches",
    "fp8_cache": "caches",
    "check": "core.contract",
    "find": "core.find",
}
__all__ = [*_HOMES, "__version__"]

if TYPE_CHECKING:
    from .c_code import export_c
    from .caches import fp8_cache, kivi_cache
    from .compare import compare
    from .compression import compress, decompress
    from .core.contract import check
    from .core.data import corpus
    from .core.find import find
    from .core.measure import measure
    from .core.model import Model, open
    from .core.plan import plan
    from .core.recipe import Recipe, run
    from .core.resizing import resize
    from .core.walk import apply
    from .deltas import pack_delta, unpack_delta
    from .fit import fit
    from .formats import export
    from .formats.lora import export_adapter
    from .mergekit import merge
    from .starter import starter
    from .tasks import pack_tasks, unpack_task


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"modelwright has no {name!r}; it has {', '.join(sorted(_HOMES))}")
    module = importlib.import_module(f"modelwright.{_HOMES[name]}")
    return module if _HOMES[name] == name else getattr(module, name)  # `fit` and `starter` are modules that can be called


def __dir__() -> list[str]:
    return sorted(__all__)


class _AfterImport(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports a module of ours right after another library's, for which it registers something there."""

    def __init__(self, theirs: str, ours: str):
        self.theirs, self.ours = theirs, f"modelwright.{ours}"
        if theirs in sys.modules:
            importlib.import_module(self.ours)
        else:
            sys.meta_path.insert(0, self)

    def find_spec(self, name: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if name != self.theirs:
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is None or spec.loader is None:
            return None
        self._loader, spec.loader = spec.loader, self
        return spec

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> Any:
        return self._loader.create_module(spec)

    def exec_module(self, module: Any) -> None:
        self._loader.exec_module(module)
        module.__loader__ = module.__spec__.loader = self._loader
        if self.ours not in sys.modules:  # where it is ours that imports theirs
            importlib.import_module(self.ours)


_AfterImport("transformers.quantizers.auto", "core.quantizer")  # reads our checkpoints
_AfterImport("peft", "core.tuners")  # knows our adapters

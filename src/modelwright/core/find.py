"""Find methods by their files: `methods/prune/wanda.py` is `prune.wanda`.

Names and summaries are read from the files without importing them, so that listing two hundred methods does not
load torch. A file that cannot be imported is an error; a method never silently vanishes.
"""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import importlib.util
import inspect
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from .errors import MethodError, nearest
from .method import Method

FOLDER = Path(__file__).parent.parent / "methods"
ENTRY_POINTS = "modelwright.methods"


@dataclass(frozen=True)
class Page:
    """What a method's file says of it, without importing it."""

    name: str
    summary: str
    text: str
    path: Path
    status: str


def names() -> list[str]:
    """All methods' names, sorted: those of the package, then those of installed entry points."""
    own = sorted(".".join(path.relative_to(FOLDER).with_suffix("").parts) for path in FOLDER.rglob("*.py") if not path.name.startswith("_"))
    return own + sorted(point.name for point in importlib.metadata.entry_points(group=ENTRY_POINTS))


def families() -> dict[str, str]:
    """Family -> the docstring of its folder: what it does and how to choose."""
    return {path.parent.name: ast.get_docstring(ast.parse(path.read_text("utf-8"))) or "" for path in sorted(FOLDER.glob("*/__init__.py"))}


def page(name: str) -> Page:
    """A method's page, read from its file."""
    path = FOLDER.joinpath(*name.split(".")).with_suffix(".py")
    if not path.is_file():
        cls = find(name)
        path = Path(inspect.getfile(cls))
    tree = ast.parse(path.read_text("utf-8"), filename=str(path))
    text = ast.get_docstring(tree) or ""
    return Page(name, text.partition("\n")[0], text, path, _class_constant(tree, "status") or Method.status)


def is_path(name: str) -> bool:
    """Whether a name is that of a file, `path/file.py` or `path/file.py:Class`."""
    return name.endswith(".py") or ".py:" in name


def exists(name: str) -> bool:
    """Whether a method has this name or there is such a file, whatever it holds."""
    return Path(name.partition(":")[0]).is_file() if is_path(name) else name in names()


def find(name: str) -> type[Method]:
    """The class of the method with this name, or of `path/file.py:Class`.

    Raises:
        MethodError: no such method, or its file fails to import; the text says which and why.
    """
    if is_path(name):
        return _outside(name)
    path = FOLDER.joinpath(*name.split(".")).with_suffix(".py")
    if path.is_file() and not path.name.startswith("_"):
        try:
            module = importlib.import_module(f"modelwright.methods.{name}")
        except Exception as error:
            raise MethodError(f"{name}: its file cannot be imported: {type(error).__name__}: {error} ({path})") from error
        return _only_class(module, name)
    for point in importlib.metadata.entry_points(group=ENTRY_POINTS):
        if point.name == name:
            cls = point.load()
            cls._outside_name = name
            return cls
    known = names()
    endings = [full for full in known if full.split(".")[-1] == name.split(".")[-1]]
    hint = f" Did you mean {endings[0]!r}?" if endings else nearest(name, known)
    raise MethodError(f"There is no method {name!r}.{hint} `modelwright list` shows all {len(known)}.")


def _outside(name: str) -> type[Method]:
    file, _, wanted = name.partition(":")
    path = Path(file)
    if not path.is_file():
        raise MethodError(f"{name}: there is no file {path}. Write path/file.py:Class.")
    unique = f"modelwright_outside_{path.resolve().as_posix().replace('/', '_')}_{path.stat().st_mtime_ns}"
    if unique not in sys.modules:
        _load_outside(name, path, unique)
    module = sys.modules[unique]
    cls = getattr(module, wanted, None) if wanted else _only_class(module, name)
    if not (isinstance(cls, type) and issubclass(cls, Method)):
        raise MethodError(f"{name}: {path} has no method class {wanted!r}.")
    cls._outside_name = f"{path}:{cls.__name__}"
    return cls


def _load_outside(name: str, path: Path, unique: str) -> None:
    spec = importlib.util.spec_from_file_location(unique, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[unique] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[unique]
        raise MethodError(f"{name}: the file cannot be imported: {type(error).__name__}: {error}") from error


def _only_class(module: ModuleType, name: str) -> type[Method]:
    found = [
        cls for cls in vars(module).values() if isinstance(cls, type) and issubclass(cls, Method) and cls.__module__ == module.__name__
    ]
    if len(found) != 1:
        listed = ", ".join(cls.__name__ for cls in found) or "none"
        raise MethodError(f"{name}: one file holds one method class; found {listed}.")
    return found[0]


def _class_constant(tree: ast.Module, name: str) -> str | None:
    """The text that a class of the file assigns to `name`."""
    for cls in (node for node in tree.body if isinstance(node, ast.ClassDef)):
        for node in cls.body:
            if isinstance(node, (ast.AnnAssign, ast.Assign)) and isinstance(node.value, ast.Constant):
                target = node.target if isinstance(node, ast.AnnAssign) else node.targets[0]
                if isinstance(target, ast.Name) and target.id == name:
                    return str(node.value.value)
    return None

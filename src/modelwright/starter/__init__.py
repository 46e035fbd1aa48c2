"""The small pretrained model that ships with the package, and the text that it was trained on.

The text is the documentation inside Python itself: the language reference in `pydoc_data.topics`, the
docstrings of the standard library's sources and those of its built-in types. It is read from the running
Python, so nothing is downloaded and no copy is kept; the sources are parsed and never imported. Another
Python version has slightly other text.

Modules are set aside whole by a hash of their top-level name (all of `email` falls on one side), and a
paragraph that also stands in the training part is dropped from the held-out part.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib
import inspect
import re
import sysconfig
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from modelwright.core.errors import DataError, ModelError
from modelwright.core.public import callable_module

if TYPE_CHECKING:
    from modelwright.core.model import Model

TOPICS = "pydoc_data.topics"
SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "pydoc_data", "__pycache__"}
SKIPPED |= {"idlelib", "lib2to3", "turtledemo"}  # parts that many systems install separately or not at all
BUILT_IN = (
    "_bisect _codecs _collections _csv _functools _heapq _io _json _operator _pickle _random _socket _sre _struct "
    "_thread _weakref array atexit binascii builtins cmath errno faulthandler gc itertools marshal math mmap posix "
    "pyexpat pwd resource select sys syslog termios time unicodedata zlib"
)


def path() -> Path:
    """The folder that holds the starter model, a normal Hugging Face checkpoint.

    Raises ModelError when the package was installed without it.
    """
    folder = Path(__file__).parent / "model"
    if not (folder / "model.safetensors").is_file():
        raise ModelError(
            f"The starter model was asked for, but {folder} has no model.safetensors. "
            "Install the package again, or make the model with `modelwright run recipes/starter.yaml`."
        )
    return folder


@functools.cache
def corpus_text() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Python's own documentation: (training documents, held-out documents), always in the same order.

    A document is one source file's docstrings, one help topic, or one built-in module's docstrings.
    Raises DataError when this Python comes without its sources.
    """
    train: list[str] = []
    held: list[str] = []
    for module, text in [*_topics(), *_sources(), *_built_in()]:
        (held if held_out(module) else train).append(text)
    if len(train) < 100 or not held:
        raise DataError(
            f"The built-in corpus needs the standard library's sources; {_library()} has too few of them. Give your own text with `data:`."
        )
    seen = {paragraph for text in train for paragraph in paragraphs(text)}
    held = ["\n\n".join(p for p in paragraphs(text) if p not in seen) for text in held]
    return tuple(train), tuple(text for text in held if text)


@functools.cache
def code_text() -> tuple[str, ...]:
    """The sources of the standard library's modules of one file, in the order of their names.

    Raises DataError when this Python comes without them.
    """
    found = tuple(file.read_text("utf-8", errors="replace") for file in sorted(_library().glob("*.py")))
    if len(found) < 50:
        raise DataError(f"The built-in code needs the standard library's sources; {_library()} has too few of them. Give your own text.")
    return found


def held_out(module: str) -> bool:
    """Whether the top-level `module` belongs to the held-out part: a hash of its name below 7 %."""
    if module == TOPICS:
        return False
    digest = hashlib.sha256(module.encode()).digest()
    return int.from_bytes(digest[:8], "big") < 0.07 * 2**64


def paragraphs(text: str) -> list[str]:
    """The pieces of `text` between blank lines, without the whitespace at their ends."""
    pieces = (piece.strip() for piece in re.split(r"\n\s*\n", text))
    return [piece for piece in pieces if piece]


def _library() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])


def _topics():
    from pydoc_data import topics

    for name in sorted(topics.topics):
        yield TOPICS, topics.topics[name].strip()


def _sources():
    root = _library()
    for file in sorted(root.rglob("*.py"), key=lambda file: file.relative_to(root).parts):
        parts = file.relative_to(root).parts
        if SKIPPED & set(parts):
            continue
        try:
            with warnings.catch_warnings():  # some old sources have escapes that warn when parsed
                warnings.simplefilter("ignore")
                tree = ast.parse(file.read_text("utf-8"))
        except (SyntaxError, ValueError, OSError):
            continue  # a template or an unreadable file, which no docstring can be read from
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        nodes = [node for node in ast.walk(tree) if isinstance(node, kinds)]
        nodes.sort(key=lambda node: getattr(node, "lineno", 0))
        docs = [ast.get_docstring(node) for node in nodes]
        if text := "\n\n".join(doc.strip() for doc in docs if doc and doc.strip()):
            yield parts[0].removesuffix(".py"), text


def _built_in():
    for name in BUILT_IN.split():
        try:
            module = importlib.import_module(name)
        except ImportError:
            continue  # not on this system
        docs = [module.__doc__]
        for key in sorted(vars(module)):
            member = vars(module)[key]
            if inspect.isclass(member) and member.__module__ in (name, "builtins"):
                docs.append(member.__doc__)
                docs += [vars(member)[part].__doc__ for part in sorted(vars(member)) if callable(vars(member)[part])]
            elif inspect.isbuiltin(member):
                docs.append(member.__doc__)
        docs = [inspect.cleandoc(doc).strip() for doc in docs if isinstance(doc, str)]
        if text := "\n\n".join(dict.fromkeys(doc for doc in docs if doc)):
            yield name.removeprefix("_"), text


def starter() -> Model:
    """The starter model, opened."""
    from modelwright.core.model import open

    return open("starter")


callable_module(__name__, starter)

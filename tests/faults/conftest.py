"""A small model with a tokenizer on disk, and processes that are killed at a chosen moment."""

from __future__ import annotations

import importlib
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from modelwright.core.contract import LETTERS, letters
from modelwright.core.model import Model
from modelwright.core.tiny import tiny

TEXT = "\n\n".join(f"{LETTERS[start:]}{LETTERS[:start]} and so on, line {start}." * 3 for start in range(60))

@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """A process with worker threads cannot be forked."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def small(tmp_path_factory) -> Path:
    """A folder with a tiny Llama and a tokenizer of letters."""
    folder = tmp_path_factory.mktemp("small") / "llama"
    Model(name="llama", module=tiny("llama"), tokenizer=letters()).save(folder)
    return folder


@pytest.fixture(scope="session")
def text(tmp_path_factory) -> Path:
    """Text that the tokenizer knows."""
    file = tmp_path_factory.mktemp("text") / "letters.txt"
    file.write_text(TEXT)
    return file


def killed_at(module: str, name: str, at: int, work: Callable[[], object]) -> None:
    """Do `work` in a process of its own that dies by SIGKILL as `module.name` is called for the `at`-th time."""
    child = os.fork()
    if child == 0:
        owner: Any = importlib.import_module(module)
        *way, last = name.split(".")
        for part in way:
            owner = getattr(owner, part)
        original, calls = getattr(owner, last), [0]

        def counted(*arguments: Any, **named: Any) -> Any:
            calls[0] += 1
            if calls[0] == at:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*arguments, **named)

        setattr(owner, last, counted)
        try:
            work()
        finally:
            os._exit(1)  # the work ended before the moment came
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), f"{name} was called fewer than {at} times"
    assert os.WTERMSIG(status) == signal.SIGKILL


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder that a run determines: all but the account, which holds times."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in ("account.json", "recipe.yaml", "report.html", "README.md")
    }

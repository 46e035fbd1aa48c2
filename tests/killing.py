"""Processes that are killed at a chosen moment, and what a run leaves."""

from __future__ import annotations

import importlib
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor, nn

from modelwright.core.contract import LETTERS
from modelwright.core.training import Course, Training, train

TEXT = "\n\n".join(f"{LETTERS[start:]}{LETTERS[:start]} and so on, line {start}." * 3 for start in range(60))


def killed_at(module: str, name: str, at: int, work: Callable[[], object]) -> None:
    """Do `work` in a process of its own that dies by SIGKILL as `module.name` is called for the `at`-th time."""
    child = os.fork()
    if child == 0:
        try:
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
            work()
        finally:
            os._exit(1)  # whatever went wrong, the child ends here
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


def straight_and_resumed(
    made: Callable[[], tuple[nn.Module, Course | None]], ids: Tensor, settings: Training, folder: Path, last: int
) -> tuple[nn.Module, nn.Module]:
    """The module of a run to its end, and that of one that is broken off after `last` steps and goes on from its checkpoint.

    made: a new module with the course of its run.
    """

    def kill(step: int, total: int, parts: object) -> None:
        if step == last:
            raise KeyboardInterrupt

    (straight, one), (broken, other), (resumed, third) = made(), made(), made()
    train(straight, ids, settings, course=one)
    with pytest.raises(KeyboardInterrupt):
        train(broken, ids, settings, course=other, folder=folder, report=kill)
    train(resumed, ids, settings, course=third, folder=folder)
    return straight, resumed

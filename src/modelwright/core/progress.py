"""Progress bars on a terminal; elsewhere, as in a log, a line now and then; nothing when quiet."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from contextvars import ContextVar
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

Item = TypeVar("Item")
Tick = Callable[..., None]
SILENT = 30.0  # seconds without a line

console = Console(stderr=True, highlight=False)
_quiet: ContextVar[bool] = ContextVar("quiet", default=False)
_current: ContextVar[Progress | None] = ContextVar("progress", default=None)


@contextlib.contextmanager
def silence(on: bool = True) -> Iterator[None]:
    """No progress inside this block."""
    token = _quiet.set(on)
    try:
        yield
    finally:
        _quiet.reset(token)


@contextlib.contextmanager
def bar(title: str, total: int | None = None) -> Iterator[Tick]:
    """A bar; call what it yields as `tick()`, `tick(note="loss 2.1")` or `tick(done=5)`."""
    if _quiet.get():
        yield lambda **_: None
        return
    if not console.is_terminal:
        yield _lines(title, total)
        return
    outer = _current.get()
    progress = outer or Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.fields[note]}"),
        console=console, transient=True,
    )  # fmt: skip
    with contextlib.nullcontext() if outer else progress:
        token = _current.set(progress)
        task = progress.add_task(title, total=total, note="")

        def tick(*, note: str | None = None, done: int | None = None) -> None:
            fields: dict[str, Any] = {"advance": 1} if done is None else {"completed": done}
            if note is not None:
                fields["note"] = note
            progress.update(task, **fields)

        try:
            yield tick
        finally:
            progress.remove_task(task)
            _current.reset(token)


def _lines(title: str, total: int | None) -> Tick:
    """Says how far something is, when it has said nothing for SILENT seconds."""
    count, said = 0, time.monotonic()

    def tick(*, note: str | None = None, done: int | None = None) -> None:
        nonlocal count, said
        count = count + 1 if done is None else done
        if time.monotonic() - said > SILENT:
            said = time.monotonic()
            console.print(f"{title}: {count}{f' of {total}' if total is not None else ''}{f', {note}' if note else ''}")

    return tick


def track(items: Iterable[Item], title: str) -> Iterator[Item]:
    """The items, with a bar."""
    with bar(title, len(items) if isinstance(items, Sized) else None) as tick:
        for item in items:
            yield item
            tick()

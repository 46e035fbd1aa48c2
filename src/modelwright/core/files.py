"""Write files and folders so that they appear whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .errors import RecipeError, WeightsError


@contextlib.contextmanager
def whole_folder(final: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A folder beside `final` to write into; renamed to `final` once all of it is on disk, removed on an error.

    Raises:
        RecipeError: `final` exists, is not empty, and `overwrite` is false.
        WeightsError: the disk is full.
    """
    refuse_existing(final, overwrite=overwrite)
    partial = final.with_name(final.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        publish(partial, final)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise WeightsError(
                f"The disk is full, so {final} was not written; nothing is left of it. Free some space and run again."
            ) from error
        raise


def refuse_existing(final: Path, *, overwrite: bool) -> None:
    """Raise when `final` holds something that would be lost."""
    if final.exists() and not overwrite and (not final.is_dir() or any(final.iterdir())):
        raise RecipeError(f"{final} exists and is not empty. Choose another folder, or pass --overwrite (overwrite=True).")


def publish(partial: Path, final: Path) -> None:
    """Fsync everything under `partial` and rename it to `final`; an old `final` is removed after the swap."""
    for path in [*partial.rglob("*"), partial]:
        _fsync(path)
    final.parent.mkdir(parents=True, exist_ok=True)
    if final.exists():
        old = final.with_name(final.name + ".old")
        shutil.rmtree(old, ignore_errors=True)
        os.rename(final, old)
        os.rename(partial, final)
        shutil.rmtree(old, ignore_errors=True)
    else:
        os.rename(partial, final)
    _fsync(final.parent)


@contextlib.contextmanager
def locked(file: Path) -> Iterator[None]:
    """Only one process at a time is inside, for this file. The system holds the lock, so it ends with a process that is killed."""
    with file.open("a") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def write_text(path: Path, text: str) -> None:
    """Write a text file whole: beside, fsynced, renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with beside.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write JSON with two spaces of indent, whole."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

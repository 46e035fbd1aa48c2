"""Write files and folders so that they appear whole or not at all.

A folder is written beside its name, as `<name>.partial`, synced to the disk, and given its name in one step. Where a
folder had the name, the two change places at once if the system can do that; otherwise the old one waits as
`.<name>.replaced` for a moment, and `restore` gives it its name back should the process be killed there. A link is
followed: the result lies where it leads. What is made on the way lies in `<name>.steps`, where one process works at a time.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from .errors import ModelwrightError, RecipeError, WeightsError

MARK = ".modelwright-partial"  # in a folder that is being written
HERE, EXCHANGE = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of renameat2(2)


@contextlib.contextmanager
def whole_folder(final: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A folder beside `final` to write into; renamed to `final` once all of it is on disk, removed on an error.

    Raises:
        RecipeError: `final` exists, is not empty, and `overwrite` is false.
        WeightsError: the disk is full.
    """
    refuse_existing(final, overwrite=overwrite)
    final = place_of(final)
    partial = partial_of(final)
    claim(partial)
    try:
        yield partial
        publish(partial, final)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        explain_full_disk(error, final)
        raise


def read_json(file: Path, error: type[ModelwrightError], advice: str) -> dict[str, Any]:
    """The object in a JSON file. Raises `error`, with `advice`, when it is none."""
    try:
        content = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as reason:
        raise error(f"{file} is no JSON: {reason}. {advice}") from None
    if not isinstance(content, dict):
        raise error(f"{file} holds JSON, but no object. {advice}")
    return content


def place_of(final: str | os.PathLike[str]) -> Path:
    """The whole path of the folder in which a result will lie, links followed."""
    return Path(final).resolve()


def steps_of(final: Path) -> Path:
    """Where what is made on the way to a folder lies until the end."""
    return final.with_name(final.name + ".steps")


def partial_of(final: Path) -> Path:
    """Where a folder is written until it is whole."""
    return final.with_name(final.name + ".partial")


def replaced_of(final: Path) -> Path:
    """Where what had the name of a folder is for the moment before it is removed."""
    return final.with_name(f".{final.name}.replaced")


def refuse_existing(final: str | os.PathLike[str], *, overwrite: bool, error: type[ModelwrightError] = RecipeError) -> None:
    """Raise `error` when a result cannot be saved to `final`, or when that holds something that would be lost."""
    place = place_of(final)
    if why := _no_place(final, place):
        raise error(f"Nothing can be saved to {final}: {why}")
    restore(place)
    if place.exists() and not place.is_dir():
        raise error(f"{final} cannot be the folder to write: it is a file. Choose another name.")
    if place.exists() and not overwrite and any(place.iterdir()):
        raise error(f"{final} exists and is not empty. Choose another folder, or pass --overwrite (overwrite=True).")


def _no_place(final: str | os.PathLike[str], place: Path) -> str:
    """Why no folder can be put at `place`, as the end of a sentence; "" if one can."""
    here = Path.cwd()
    if place == here or place in here.parents:
        return f"a result takes the place of its folder, and this one is or holds the current one, {here}. Name a folder inside it."
    if os.path.islink(final) and not os.path.exists(place):
        return f"it is a link to {place}, which is not there. Make that folder, or save elsewhere."
    above = next(folder for folder in place.parents if os.path.exists(folder))
    if not above.is_dir():
        return f"{above} is a file, and not a folder. Choose another name."
    if not os.access(above, os.W_OK | os.X_OK):
        return f"the folder {above} is not writable. Make it so, or save elsewhere."
    if os.path.isdir(place) and not place.stat().st_mode & 0o222:
        return "its mode says that it is not writable. Change that, or save elsewhere."
    return ""


def refuse_inputs(final: str | os.PathLike[str], sources: Iterable[Path]) -> None:
    """Raise RecipeError when the folder to write is one that is read, holds one or lies in one: an input is never touched."""
    target = place_of(final)
    for source in sources:
        if source.resolve().is_relative_to(target):
            raise RecipeError(f"{final} is, or holds, the input {source}, which is never touched. Save to another folder.")
        if source.resolve() in target.parents:
            raise RecipeError(f"{final} lies inside the input {source}, which is never touched. Save to another folder.")


@contextlib.contextmanager
def alone(final: Path) -> Iterator[Path]:
    """The folder for what is made on the way to `final`, with no other process inside; removed at the end if it is empty.

    Raises:
        RecipeError: another process is inside, or what has the name of the folder is none.
    """
    folder = steps_of(final)
    if folder.is_symlink() or folder.exists() and not folder.is_dir():
        raise RecipeError(f"{folder} is where a run keeps its steps, but holds something else. Move it, or save elsewhere.")
    folder.mkdir(parents=True, exist_ok=True)
    with _lock(folder) as taken:
        if not taken:
            raise RecipeError(f"Another process is saving to {final} now. Let it finish, or save to another folder.")
        try:
            yield folder
        finally:
            with contextlib.suppress(OSError):  # something lies there, from which a run goes on
                folder.rmdir()


@contextlib.contextmanager
def fresh_folder(folder: Path) -> Iterator[Path]:
    """An empty folder of this name, removed at the end; what a process that was killed has left there goes first."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _lock(folder: Path) -> Iterator[bool]:
    """Whether no other process has this folder; the system holds the lock, so it ends with a process that is killed."""
    try:
        import fcntl

        handle = os.open(folder, os.O_RDONLY)
    except (ImportError, PermissionError):  # Windows locks no folders
        yield True
        return
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The process that had it may have removed the folder meanwhile.
            taken = os.path.exists(folder) and os.path.samestat(os.fstat(handle), os.stat(folder))
        except BlockingIOError:
            taken = False
        except OSError:  # a disk without locks
            taken = True
        yield taken
    finally:
        os.close(handle)


def claim(partial: Path, *, keep: bool = False) -> None:
    """Make a folder to write into, with a mark that it is ours; what a killed process left there goes, unless `keep`.

    Raises:
        RecipeError: the folder is there without the mark, so it is the user's.
    """
    if partial.exists() and not (partial / MARK).is_file():
        raise RecipeError(f"{partial} is where the result would be written before it is whole, but it is there already. Move it away.")
    if partial.exists() and not keep:
        shutil.rmtree(partial)
    partial.mkdir(parents=True, exist_ok=True)
    (partial / MARK).touch()


def restore(folder: Path) -> None:
    """Give a folder its name back if a process was killed after it had moved it away and before the new one had its place."""
    old = replaced_of(folder) if folder.name else folder
    if old.is_dir() and not os.path.lexists(folder):
        with contextlib.suppress(OSError):  # another process was first
            os.rename(old, folder)


def publish(partial: Path, final: Path) -> None:
    """Fsync everything under `partial` and give it the name `final`; a folder that had the name is removed afterwards."""
    for path in [*partial.rglob("*"), partial]:
        sync(path)
    final.parent.mkdir(parents=True, exist_ok=True)
    if not os.path.lexists(final):
        os.rename(partial, final)
        (final / MARK).unlink(missing_ok=True)
        sync(final.parent)
        return
    old = replaced_of(final)
    _remove(old)
    # Under that name already, so that nobody who goes on from a partial folder finds the old one there.
    os.rename(partial, old)
    try:
        if not exchange(old, final):
            os.rename(old, partial)
            os.rename(final, old)
            os.rename(partial, final)
    except OSError:
        if not os.path.lexists(final):
            os.rename(old, final)
        elif not partial.exists():
            os.rename(old, partial)
        raise
    (final / MARK).unlink(missing_ok=True)
    sync(final.parent)
    _remove(old)


def exchange(one: Path, two: Path) -> bool:
    """Let two paths change places in one step; False where the system or its disk cannot."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):
        return False
    if rename(HERE, os.fsencode(one), HERE, os.fsencode(two), EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM):
        return False
    raise OSError(number, os.strerror(number), str(two))


def explain_full_disk(error: BaseException | None, folder: Path) -> None:
    """Raise WeightsError if the error says that the disk is full."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        raise WeightsError(
            f"The disk filled up while {folder} was written, so that folder was not made. Make room, or write to another disk."
        ) from error


def _remove(path: Path) -> None:
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)


@contextlib.contextmanager
def locked(file: Path) -> Iterator[None]:
    """Only one process at a time is inside, for this file. The system holds the lock, so it ends with a process that is killed."""
    import fcntl  # which Windows lacks

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


def sync(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk."""
    if os.name == "nt":  # Windows opens no folders
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

"""Fetch from the Hugging Face hub what is no folder here, and say so where it is nowhere."""

from __future__ import annotations

import contextlib
import difflib
import os
import re
from collections.abc import Sequence
from pathlib import Path

from .errors import ModelwrightError


def is_name(name: str) -> bool:
    """Whether a repository of the hub could have this name: it does not begin with . or ~, and has one slash at most."""
    return re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", name) is not None


def fetch(
    name: str,
    patterns: Sequence[str],
    *,
    what: str,
    error: type[ModelwrightError],
    revision: str | None = None,
    kind: str = "model",
    advice: str = "Check the name, the connection or your login.",
) -> Path:
    """The folder of a repository of the hub, its files fetched that match a pattern. Nothing of this name lies here.

    what: what is looked for, as the errors call it. kind: of the repository, "model" or "dataset". advice: what to do
        where the hub does not give it.

    Raises:
        error: the name can only be that of a folder, or the hub does not give it; both name what lies here under nearly that name.
    """
    hint = nearest_path(name)
    if not is_name(name):
        raise error(f"{what} at {name} was asked for, but there is no such folder.{hint}")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(patterns), repo_type=kind))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as reason:
        first = next(iter(str(reason).splitlines()), "no reason")
        raise error(
            f"{what} {name!r} was asked for; there is no such folder here, and the hub did not give it "
            f"({type(reason).__name__}: {first}).{hint} {advice}"
        ) from reason


def nearest_path(name: str) -> str:
    """`" Did you mean 'models/x'?"` for the path here nearest to `name`, folder by folder; nothing where it exists or none is near."""
    path = Path(os.path.expanduser(name))
    if path.exists():
        return ""
    found = Path(path.anchor)
    for part in path.parts[bool(path.anchor) :]:
        if not (found / part).exists():
            beside: list[str] = []
            with contextlib.suppress(OSError):
                beside = os.listdir(found)
            near = difflib.get_close_matches(part, beside, n=1)
            if not near:
                return ""
            part = near[0]
        found /= part
    return f" Did you mean {str(found)!r}?"

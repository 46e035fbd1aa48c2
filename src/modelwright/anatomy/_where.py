"""The language of `where` and `skip`."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable
from fnmatch import fnmatchcase

from modelwright.core.errors import SiteError, nearest

from ._base import Site

BLOCKS = re.compile(r"blocks?\s+(\d+)(?:\s*-\s*(\d+))?")


def matches(site: Site | str, depth: int | None, pattern: str | Iterable[str]) -> bool:
    """Whether a site, or a role at a depth, is one of those that `pattern` names.

    A pattern is a role (`mlp.down`), the first word of several (`attn` is every `attn.*`), a glob (`*.up`), choices
    (`attn.{q,v}`), blocks (`block 3`, `blocks 2-5`, both ends included), or a list of these, of which one must match.

    Raises: SiteError for a word that is no role of any family.
    """
    role = site.role if isinstance(site, Site) else site
    depth = site.depth if isinstance(site, Site) else depth
    if not isinstance(pattern, str):
        return any(matches(role, depth, one) for one in pattern)
    globs, blocks = _parse(pattern)
    if blocks is not None:
        return depth is not None and blocks[0] <= depth <= blocks[1]
    return _names(role, globs)


@functools.lru_cache(maxsize=1024)
def _parse(pattern: str) -> tuple[tuple[str, ...], tuple[int, int] | None]:
    """The globs of a pattern of roles, or the first and last block of a pattern of blocks."""
    from ._find import roles

    pattern = pattern.strip()
    if found := BLOCKS.fullmatch(pattern):
        first = int(found[1])
        return (), (first, int(found[2]) if found[2] else first)
    globs = tuple(_choices(pattern))
    for glob in globs:
        if not any(_names(role, (glob,)) for role in roles()):
            words = [*roles(), *{role.split(".")[0] for role in roles()}, "block 0", "blocks 0-3"]
            hint = nearest(glob, words) or f" Parts are {', '.join(roles())}."
            raise SiteError(f"{pattern!r} names no part of any model.{hint}")
    return globs, None


def _names(role: str, globs: tuple[str, ...]) -> bool:
    return any(fnmatchcase(role, glob) or fnmatchcase(role, glob + ".*") for glob in globs)


def _choices(pattern: str) -> list[str]:
    """`attn.{q,v}` → `attn.q`, `attn.v`."""
    found = re.search(r"\{([^{}]*)\}", pattern)
    if not found:
        return [pattern]
    return [
        whole for choice in found[1].split(",") for whole in _choices(pattern[: found.start()] + choice.strip() + pattern[found.end() :])
    ]

"""The settings of a method: typed fields with ranges, and values that differ by place.

A setting is a dataclass field made by `fraction`, `count`, `number` or a plain default whose type is checked.
A number of a method that works site by site may also be a list over depth, first block to last, or a map
by role: `sparsity=[0.3, 0.7]`, `bits={"mlp": 4, "attn": 8}`. A role that no key of a map matches is left alone.
"""

from __future__ import annotations

import dataclasses
import math
import re
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Union

from .errors import SettingError, nearest


@dataclass(frozen=True)
class Range:
    """The values that a number may take, ends included, and its unit."""

    low: float | None = None
    high: float | None = None
    unit: str = ""

    def __str__(self) -> str:
        low, high = self.low, self.high
        if low is not None and low == high:
            text = f"of exactly {low:g}"
        elif low is not None and high is not None:
            text = f"from {low:g} to {high:g}"
        elif low is not None:
            text = f"of at least {low:g}"
        elif high is not None:
            text = f"of at most {high:g}"
        else:
            text = "of any size"
        return f"{text} {self.unit}".rstrip()

    def holds(self, value: float) -> bool:
        return math.isfinite(value) and (self.low is None or value >= self.low) and (self.high is None or value <= self.high)

    def outside(self) -> list[float]:
        """Values just beyond each end, for tests."""
        return [end + step for end, step in ((self.low, -1), (self.high, 1)) if end is not None]


def fraction(default: Any, low: float = 0.0, high: float = 1.0) -> Any:
    """A share from 0 to 1."""
    return dataclasses.field(default=default, metadata={"range": Range(low, high)})


def count(default: Any, low: int = 1, high: int | None = None, unit: str = "") -> Any:
    """A whole number of something."""
    return dataclasses.field(default=default, metadata={"range": Range(low, high, unit)})


def number(default: Any, low: float | None = None, high: float | None = None, unit: str = "") -> Any:
    """A real number in a range, with its unit."""
    return dataclasses.field(default=default, metadata={"range": Range(low, high, unit)})


@dataclass(frozen=True)
class Pattern:
    """Keep `keep` of every `of` consecutive inputs of a row; written "2:4"."""

    keep: int
    of: int

    @classmethod
    def parse(cls, text: object) -> Pattern:
        """Read "keep:of".

        Raises:
            SettingError: the text has another form, or keeps none or more than there are.
        """
        if isinstance(text, Pattern):
            return text
        found = re.fullmatch(r"(\d+):(\d+)", str(text))
        if not found or not 0 < int(found[1]) <= int(found[2]):
            raise SettingError(f'A pattern is written "keep:of", such as "2:4" (keep two of every four); found {text!r}.')
        return cls(int(found[1]), int(found[2]))

    def __str__(self) -> str:
        return f"{self.keep}:{self.of}"

    def __repr__(self) -> str:
        return repr(str(self))

    @property
    def sparsity(self) -> float:
        return 1 - self.keep / self.of


class ByRole(Mapping[str, Any]):
    """A setting that differs by role: an unchangeable, hashable map that prints as a dict."""

    def __init__(self, entries: Mapping[str, Any]):
        self._entries = dict(entries)

    def __getitem__(self, key: str) -> Any:
        return self._entries[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __hash__(self) -> int:
        return hash(tuple(self._entries.items()))

    def __repr__(self) -> str:
        return repr(self._entries)


def check(owner: str, field: dataclasses.Field, kind: Any, value: Any, by_place: bool) -> Any:
    """`value` cast to the field's type, with lists and maps made hashable.

    Raises:
        SettingError: wrong type or outside the range; the text names the method, the setting and what is allowed.
    """
    limits = field.metadata.get("range")
    numeric = limits is not None or bool({int, float} & set(_options(kind)))
    if by_place and numeric and isinstance(value, Mapping):
        if not value:
            raise SettingError(f"{owner}: {field.name} is an empty map. Give it at least one role, such as mlp.")
        return ByRole({str(role): check(owner, field, kind, inner, by_place) for role, inner in value.items()})
    if by_place and numeric and isinstance(value, (list, tuple)) and tuple not in _options(kind):
        if not value:
            raise SettingError(f"{owner}: {field.name} is an empty list. Give it one value or more, first block to last.")
        return tuple(check(owner, field, kind, inner, False) for inner in value)
    try:
        result = _cast(kind, value)
    except (TypeError, ValueError):
        allowed = f"{describe_kind(kind)}{f' {limits}' if limits else ''}"
        raise SettingError(f"{owner}: {field.name} must be {allowed}; got {value!r}.") from None
    parts = result if isinstance(result, tuple) else (result,)
    for part in parts:
        if limits and isinstance(part, (int, float)) and not isinstance(part, bool) and not limits.holds(part):
            raise SettingError(f"{owner}: {field.name} must be {describe_kind(kind)} {limits}; got {value!r}.")
    return result


def _options(kind: Any) -> tuple[Any, ...]:
    """The member types of a union, with `X[...]` as `X`; a plain type alone."""
    members = typing.get_args(kind) if typing.get_origin(kind) in (Union, types.UnionType) else (kind,)
    return tuple(typing.get_origin(member) or member for member in members)


def _cast(kind: Any, value: Any) -> Any:
    origin = typing.get_origin(kind)
    if origin in (Union, types.UnionType):
        members = typing.get_args(kind)
        if value is None and type(None) in members:
            return None
        for member in sorted((m for m in members if m is not type(None)), key=lambda m: m is str):
            try:
                return _cast(member, value)
            except (TypeError, ValueError):
                continue
        raise ValueError(value)
    if origin is Literal:
        if value in typing.get_args(kind) and type(value) in {type(option) for option in typing.get_args(kind)}:
            return value
        raise ValueError(value)
    if origin is tuple:
        if isinstance(value, str) or not isinstance(value, (list, tuple)):
            raise TypeError(value)
        inner = typing.get_args(kind)
        return tuple(_cast(inner[0], part) for part in value)
    if kind is Any:
        return value
    if kind is Pattern:
        return Pattern.parse(value)
    if kind is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    if kind is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, bool) is not (kind is bool) or not isinstance(value, kind):
        raise TypeError(value)
    return value


def describe_kind(kind: Any) -> str:
    """A type in words: "a fraction or whole number", "one of 'tensor', 'row'"."""
    origin = typing.get_origin(kind)
    if origin in (Union, types.UnionType):
        return " or ".join(describe_kind(member) for member in typing.get_args(kind))
    if origin is Literal:
        return "one of " + ", ".join(repr(option) for option in typing.get_args(kind))
    if origin is tuple:
        return f"a list of values, each {describe_kind(typing.get_args(kind)[0])}"
    names = {
        int: "a whole number",
        float: "a number",
        bool: "true or false",
        str: "a text",
        type(None): "null",
        Pattern: 'a pattern such as "2:4"',
        Any: "any value",
    }
    return names.get(kind, getattr(kind, "__name__", str(kind)))


def at_depth(values: tuple[Any, ...], depth: int | None, depths: int) -> Any:
    """The value for block `depth` of `depths`: straight lines between equally spaced anchors.

    Whole numbers take the nearest anchor. What lies outside the blocks (embedding, head) takes the first anchor.
    """
    if depth is None or depths <= 1 or len(values) == 1:
        return values[0]
    spot = depth / (depths - 1) * (len(values) - 1)
    below = min(int(spot + 1e-9), len(values) - 2)
    share = spot - below
    if abs(share) < 1e-9 or not all(isinstance(value, float) for value in values):
        return values[min(round(spot), len(values) - 1)]
    return values[below] * (1 - share) + values[below + 1] * share


def unknown_setting(owner: str, key: str, known: list[str]) -> str:
    """The sentence for a key that is no setting."""
    listed = f"Its settings are {', '.join(known)}." if known else "It has no settings."
    return f"{owner} has no setting {key!r}.{nearest(key, known)} {listed}"

"""Adapters that peft has, by our words, and what low-rank adapters have in common."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from modelwright.core.errors import SettingError
from modelwright.core.method import AdapterMethod
from modelwright.core.settings import count


@dataclass(frozen=True, kw_only=True)
class StockAdapter(AdapterMethod):
    """An adapter of peft's: its config, and what our settings are called there."""

    checked_on: ClassVar[tuple[str, ...]] = ("llama",)
    config: ClassVar[str]  # the name of the class
    calls: ClassVar[Mapping[str, str]] = {}  # our setting -> peft's, where they differ
    patterns: ClassVar[Mapping[str, str]] = {}  # our setting -> peft's map of layers to their own values
    apart: ClassVar[tuple[str, ...]] = ()  # settings that peft is not told as they are
    fixed: ClassVar[Mapping[str, Any]] = {}  # what peft is told beside the settings

    def adapter(self, layers: Mapping[str, Self], roles: Mapping[str, str]) -> Any:
        import peft

        names = [name for name in self.own() if name not in self.apart]
        usual = {name: Counter(getattr(one, name) for one in layers.values()).most_common(1)[0][0] for name in names}
        told: dict[str, Any] = {self.calls.get(name, name): value for name, value in usual.items()}
        for name, value in usual.items():
            own = {path: getattr(one, name) for path, one in layers.items() if getattr(one, name) != value}
            if own and name not in self.patterns:
                raise SettingError(f"{self.name()}: {name} differs from layer to layer, and peft takes one for all. Give one number.")
            if own:
                told[self.patterns[name]] = own
        return getattr(peft, self.config)(target_modules=list(layers), **told, **self.fixed, **self.told(roles))

    def told(self, roles: Mapping[str, str]) -> dict[str, Any]:
        """What else peft is told, with the roles of layers by their paths; for methods to extend."""
        return {}

    @classmethod
    def own(cls) -> list[str]:
        """The names of the settings, without the choice of layers."""
        return [field.name for field in dataclasses.fields(cls) if field.name not in ("where", "skip")]


@dataclass(frozen=True, kw_only=True)
class LowRank(StockAdapter):
    """An adapter of peft's whose updates have a rank."""

    rank: int = count(8)  # of the update

    def unfit(self, shape: tuple[int, ...]) -> str:
        return beyond(self.rank, shape)


def beyond(rank: int, shape: tuple[int, ...]) -> str:
    """Why a rank is too high for a matrix [out, in], as the end of a sentence; "" where it is not."""
    most = min(shape[0], shape[1]) if len(shape) > 1 else 0
    return f"is {shape[0]} × {shape[1]}, and cannot have the rank {rank}. Give a rank of at most {most}" if rank > most else ""


def undivided(number: int, parts: int, what: str) -> str:
    """Why a setting does not divide one of a matrix's sizes, as the end of a sentence; "" where it does."""
    return f"has {number} numbers along a side, which {what} {parts} does not divide. Give a divisor of {number}" if number % parts else ""


def few(shape: tuple[int, ...], trained: int, what: str) -> str:
    """Why a matrix [out, in] is too small for so many trained entries, as the end of a sentence; "" where it is not."""
    values = shape[0] * shape[1]
    return f"has {values:,} entries, and {what} asks for {trained:,}. Give fewer" if trained > values else ""


def within(rank: int | None, shape: tuple[int, ...]) -> tuple[int, str]:
    """The rank that a matrix [out, in] takes, its own where it is lower or none is given; and a note on that, "" where it is as asked."""
    most = min(shape[:2])
    return min(rank or most, most), f"cannot have the rank {rank}, and take {most}" if rank and rank > most else ""

"""Adapters that peft has, by our words, and what low-rank adapters have in common."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from modelwright.core.errors import SettingError
from modelwright.core.method import AdapterMethod, Method


@dataclass(frozen=True, kw_only=True)
class StockAdapter(AdapterMethod):
    """An adapter of peft's: its config, and what our settings are called there."""

    config: ClassVar[str]  # the name of the class
    calls: ClassVar[Mapping[str, str]] = {}  # our setting -> peft's, where they differ
    patterns: ClassVar[Mapping[str, str]] = {}  # our setting -> peft's map of layers to their own values
    fixed: ClassVar[Mapping[str, Any]] = {}  # what peft is told beside the settings
    untold: ClassVar[tuple[str, ...]] = ()  # our settings that peft is not told, since `attached` is what they are for

    def adapter(self, layers: Mapping[str, Self]) -> Any:
        import peft

        usual = {name: Counter(getattr(one, name) for one in layers.values()).most_common(1)[0][0] for name in self.own()}
        told: dict[str, Any] = {self.calls.get(name, name): value for name, value in usual.items()}
        for name, value in usual.items():
            own = {path: getattr(one, name) for path, one in layers.items() if getattr(one, name) != value}
            if own and name not in self.patterns:
                raise SettingError(f"{self.name()}: {name} differs from layer to layer, and peft takes one for all. Give one number.")
            if own:
                told[self.patterns[name]] = own
        return getattr(peft, self.config)(target_modules=list(layers), **told, **self.fixed)

    @classmethod
    def own(cls) -> list[str]:
        """The names of the settings that peft is told."""
        return [field.name for field in dataclasses.fields(cls) if field.name not in ("where", "skip", *cls.untold)]


def beyond(method: Method, rank: int, shape: tuple[int, ...]) -> str:
    """Why a rank is too high for a matrix [out, in], as the end of a sentence; "" where it is not."""
    most = min(shape[0], shape[1]) if len(shape) > 1 else 0
    return f"is {shape[0]} × {shape[1]}, and cannot have the rank {rank}. Give a rank of at most {most}" if rank > most else ""


def within(rank: int | None, shape: tuple[int, ...]) -> tuple[int, str]:
    """The rank that a matrix [out, in] takes, its own where it is lower or none is given; and a note on that, "" where it is as asked."""
    most = min(shape[:2])
    return min(rank or most, most), f"cannot have the rank {rank}, and take {most}" if rank and rank > most else ""

"""Adapters that peft has, by our words, and what low-rank adapters have in common."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor

from modelwright.blocks.bottlenecks import Activation
from modelwright.blocks.gated import Source
from modelwright.core.adapters import trained
from modelwright.core.errors import LayoutError, ModelError, SettingError
from modelwright.core.method import AdapterMethod, LayerAdapter
from modelwright.core.settings import count, fraction, number


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

    sized_by: ClassVar[tuple[str, ...]] = ("rank",)

    rank: int = count(8)  # of the update

    def unfit(self, shape: tuple[int, ...]) -> str:
        return beyond(self.rank, shape)


@dataclass(frozen=True, kw_only=True)
class Lowered(LowRank):
    """An adapter of the class that peft has for LoRA and its kin."""

    config = "LoraConfig"
    calls = dict(rank="r", alpha="lora_alpha", dropout="lora_dropout", stabilised="use_rslora")
    patterns = dict(rank="rank_pattern", alpha="alpha_pattern")

    alpha: float = number(16.0, low=0)  # the update is scaled by alpha / rank
    dropout: float = fraction(0.0, high=0.99)  # of the update's inputs, while training


@dataclass(frozen=True, kw_only=True)
class OfTwoProducts(LowRank):
    """An adapter whose update is made of two small products, as LyCORIS has them."""

    neutral = {}  # a factor starts at zero: attaching changes no output
    calls = dict(rank="r", dropout="rank_dropout")
    patterns = dict(rank="rank_pattern", alpha="alpha_pattern")

    alpha: float = number(16.0, low=0)  # the update is scaled by alpha / rank
    dropout: float = fraction(0.0, high=0.99)  # of whole ranks, while training


@dataclass(frozen=True, kw_only=True)
class OfWaves(StockAdapter):
    """An adapter whose update is a sum of few waves at places that are drawn once."""

    neutral = {}  # the waves start at zero
    sized_by: ClassVar[tuple[str, ...]] = ("frequencies",)
    small = dict(frequencies=50)
    calls = dict(frequencies="n_frequency", scale="scaling")
    patterns = dict(frequencies="n_frequency_pattern")

    frequencies: int = count(1000)  # waves that train, of each matrix
    scale: float = number(1.0)  # of the update

    def unfit(self, shape: tuple[int, ...]) -> str:
        return few(shape, self.frequencies, "frequencies")


@dataclass(frozen=True, kw_only=True)
class Bottlenecked(LayerAdapter):
    """An adapter of ours that is a bottleneck scale · U φ(D x) somewhere at a layer."""

    suffices: ClassVar[frozenset[str]] = frozenset({"packed"})
    neutral = {}  # U starts at zero
    sized_by: ClassVar[tuple[str, ...]] = ("inner",)
    small = dict(inner=8)

    inner: int = count(256)  # rows of D, columns of U
    activation: Activation = "tanh"  # φ
    scale: float = number(1.0)  # of what the bottleneck gives


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


@dataclass(frozen=True, kw_only=True)
class OnTrained(LayerAdapter):
    """An adapter that mixes others, which were trained before and are held: y + Σ_k g_k ⊙ f_k. It stands where these stand."""

    sources: tuple[str, ...] = ()  # folders of trained adapters: LoRA, adapt.parallel or adapt.series; at least one
    activation: Activation = "none"  # φ of the sources; none for LoRA
    side: Literal["beside", "after"] = "beside"  # where the sources stand; adapt.series stands after layers

    def adapter(self, layers: Mapping[str, Self], roles: Mapping[str, str]) -> Any:
        self.refuse_none()
        known = {path for folder in self.sources for path in trained(folder).pairs}
        if not known & layers.keys():
            raise LayoutError(f"{self.name()}: none of the chosen layers is adapted in {', '.join(self.sources)}. Choose those that are.")
        return super().adapter({path: local for path, local in layers.items() if path in known}, roles)

    def refuse_none(self) -> None:
        """Raise SettingError where no sources are named."""
        if not self.sources:
            raise SettingError(f"{self.name()}: it mixes adapters that were trained before. Name their folders: sources: [folder, ...].")

    def held(self, weight: Tensor) -> list[Source]:
        """Empty sources beside a weight [out, in], for `fill` or a file to put the values in."""
        self.refuse_none()
        seen = weight.shape[0] if self.side == "after" else weight[0].numel()
        return [Source(torch.zeros(len(weight), 0), torch.zeros(0, seen), self.activation) for _ in self.sources]

    def fill(self, part: Any, path: str) -> None:
        pairs = []
        for folder, source in zip(self.sources, part.sources, strict=True):
            found = trained(folder)
            if (found.activation, found.side) != (self.activation, self.side):
                raise SettingError(
                    f"{self.name()}: {folder} has activation {found.activation} and stands {found.side} layers. "
                    f"Give activation: {found.activation} and side: {found.side}, and sources that are alike."
                )
            up, down = found.pairs.get(path, (source.up, source.down))
            if (len(up), down.shape[1]) != (len(source.up), source.down.shape[1]):
                sizes = f"{len(up)} × {down.shape[1]}, and the layer {len(source.up)} × {source.down.shape[1]}"
                raise ModelError(f"{self.name()}: {folder} was trained on another model: at {path} it is {sizes}.")
            pairs.append((up, down))
        part.take(pairs, self.activation)

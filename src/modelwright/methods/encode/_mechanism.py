"""Encoding: values → symbols → an entropy code.

`Tally` counts what is stored without loss. `DeltaCodec` is the loop of all codecs of changes: what a model has learned beyond its base,
tensor by tensor in the order of their names, is taken to few values; a method fills in which entries stay and what they become.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from modelwright.core import kinds, walk
from modelwright.core.method import ModelMethod, Places
from modelwright.core.model import Model, unwrapped
from modelwright.core.settings import fraction
from modelwright.core.together import same_tensors
from modelwright.maths import few_values
from modelwright.maths.few_values import Code, FewValues
from modelwright.maths.slices import Entries, Sliced
from modelwright.maths.task_vectors import delta, onto, wide

NUMBA = 120_000_000  # bytes that the compiler and the loops of `maths.prefix_codes` take
Scope = Literal["model", "tensor"]


def change_of(base: Entries, end: Entries) -> Sliced:
    """What a model has beyond its base, as a tensor that is computed by slices."""
    return Sliced(tuple(base.shape), wide(base, end), delta(base, end))


@dataclass(frozen=True, kw_only=True)
class DeltaCodec(ModelMethod):
    """Makes the model what its coded change gives back: θ0 + τ̂."""

    alike: ClassVar[bool] = True
    drops: ClassVar[frozenset[str]] = frozenset({"sparse"})
    sites: ClassVar[tuple[str, ...]] = ()  # every float tensor

    keep: float = fraction(0.05)  # of the change's entries, the largest; the others become 0
    code: Code = "rice"  # of the bytes: rice gaps between entries that are not 0, huffman all entries, masks a bit for each and value
    where: Places = None  # roles whose change is coded; by default every tensor. The others stay as they are
    skip: Places = None  # roles to leave alone

    @abstractmethod
    def coded(self, changes: Mapping[str, Sliced]) -> Iterator[tuple[str, FewValues]]:
        """Every change by name, in the order of the names, at few values."""

    @torch.no_grad()
    def model(self, model: Model, base: Model, notes: list[str]) -> Model:
        same_tensors(model, [base])
        module, before = unwrapped(model.module), kinds.held(unwrapped(base.module))
        chosen = sorted(site.name for site, _ in walk.choose(None, walk.everything(module), self, notes))
        own = {name: value for name, value in kinds.held(module).items() if name in chosen}
        nbytes = entries = nonzeros = whole = 0
        for name, change in self.coded({name: change_of(before[name].cpu(), own[name].cpu()) for name in chosen}):
            parts, _ = few_values.encode(change, self.code)
            nbytes += sum(part.nbytes for part in parts.values())
            entries, nonzeros = entries + len(change.labels), nonzeros + int(change.labels.count_nonzero())
            whole += own[name].nbytes
            own[name].copy_(onto(before[name].cpu(), change.read, 1.0).whole())
        notes.append(
            f"{self.name()}: {nonzeros:,} of {entries:,} entries of the change are not 0; it takes {nbytes:,} bytes, "
            f"{8 * nbytes / max(entries, 1):.3f} bits an entry, {whole / max(nbytes, 1):.1f} times fewer than the tensors themselves"
        )
        return model


class Tally(str):
    """A note for the user that grows with every tensor: how many weights were coded, in how many bytes, and how few could be."""

    weights: int
    stored: int
    least: float

    @classmethod
    def add(cls, notes: list[str], name: str, weights: int, stored: int, least: float) -> None:
        """Count one more tensor of so many weights, in the note of this step.

        stored: its bytes. least: the bytes that its exponents' entropy leaves.
        """
        place = next((number for number, note in enumerate(notes) if isinstance(note, cls)), len(notes))
        if place < len(notes):
            before: Any = notes.pop(place)
            weights, stored, least = weights + before.weights, stored + before.stored, least + before.least
        note = cls(
            f"{name}: {weights:,} weights take {8 * stored / weights:.3f} bits each; the entropy of their exponents leaves "
            f"{8 * least / weights:.3f} at least"
        )
        note.weights, note.stored, note.least = weights, stored, least
        notes.insert(place, note)

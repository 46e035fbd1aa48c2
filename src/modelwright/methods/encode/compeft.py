"""Store what a model has learned as signs of one size: the largest changes, and none of the others.

Yadav et al. 2023, arXiv:2311.13171 (ComPEFT), algorithm 1 and section 2.2: τ̂ = α·σ·sign(τ) at the `keep` largest |τ| of all tensors
together, σ the standard deviation of all entries of τ; places as Golomb-Rice codes of the gaps, and a bit for each sign.
Differs: by the authors α is searched on validation text, here it is a setting; the size is stored as float32; exactly round(keep · n)
entries stay, of those that tie the first; with `scope` tensor each tensor has its own cut and size. The authors' code has no coder.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

from modelwright.core.settings import number
from modelwright.maths.few_values import FewValues, Largest, deviation, signs
from modelwright.maths.slices import Joined, Sliced
from modelwright.methods.encode._mechanism import DeltaCodec, Scope


@dataclass(frozen=True, kw_only=True)
class Compeft(DeltaCodec):
    """Reduce a fine-tuned model's change of its base to signs of one size, about a third of a bit for each weight at 5%."""

    status: ClassVar[str] = "checked"

    scale: float = number(1.0, low=0)  # of the size, α; larger for small models
    scope: Scope = "model"  # what competes, and has one size: all tensors, or each by itself

    def coded(self, changes: Mapping[str, Sliced]) -> Iterator[tuple[str, FewValues]]:
        names = sorted(changes)
        groups = [names] if self.scope == "model" else [[name] for name in names]
        for group in filter(None, groups):
            joined = Joined([changes[name] for name in group])
            largest = Largest(joined, round(self.keep * joined.shape[0]))
            size = self.scale * deviation(joined)
            for name in group:
                part = changes[name].whole().view(-1)
                yield name, signs(part, largest.mark(part), size)

"""Store each tensor's largest changes at a few values of its own.

Malekijoo et al. 2021, arXiv:2102.01593 (FedZip), section 3: of each tensor, but biases, the largest entries by size stay, the share
1 - z; k-means takes them to three values; what remains is coded, by Huffman or by the distances between addresses.
Differs: one value is exactly 0, where the authors' middle cluster is the mean of what it holds; clusters begin with means of equally many
entries of each sign, where theirs begin evenly between the extremes and may end empty; what has one axis, norms as well as biases, loses
no entry; every code is written out, where their code prints sizes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

from modelwright.core.settings import count, fraction
from modelwright.maths.few_values import Code, FewValues, Largest, clustered
from modelwright.maths.slices import Sliced
from modelwright.methods.encode._mechanism import NUMBA, DeltaCodec


@dataclass(frozen=True, kw_only=True)
class Fedzip(DeltaCodec):
    """Reduce a fine-tuned model's change of its base to three values in each tensor, which k-means finds."""

    status: ClassVar[str] = "checked"
    loads: ClassVar[Mapping[str, int]] = {"numba": NUMBA}

    keep: float = fraction(0.2)  # of the entries of each tensor's change, the largest, 1 - z; the others become 0
    code: Code = "huffman"  # of the bytes: huffman all entries, rice gaps between entries that are not 0, masks a bit for each and value
    levels: int = count(3, low=3, high=255)  # values, an odd number: 0, and as many below it as above
    iterations: int = count(4, low=0)  # the most steps of k-means

    def problems(self) -> list[str]:
        return [] if self.levels % 2 else [f"levels is {self.levels}; an odd number has as many below 0 as above."]

    def coded(self, changes: Mapping[str, Sliced]) -> Iterator[tuple[str, FewValues]]:
        for name, change in sorted(changes.items()):
            part = change.whole().view(-1)
            keep = self.keep if len(change.shape) > 1 else 1.0
            kept = Largest(part, round(keep * len(part))).mark(part)
            yield name, clustered(part, kept, self.levels, self.iterations)

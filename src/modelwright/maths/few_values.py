"""Changes that take few values, most of them 0: which entries stay, what they become, and their bytes.

ComPEFT (Yadav et al. 2023, arXiv:2311.13171) and FedZip (Malekijoo et al. 2021, arXiv:2102.01593).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from modelwright.core.errors import WeightsError
from modelwright.maths import golomb_rice, prefix_codes
from modelwright.maths.bits import packed, unpacked
from modelwright.maths.masks import find_cut
from modelwright.maths.prefix_codes import Coded
from modelwright.maths.slices import Entries, each, flat

Code = Literal["rice", "huffman", "masks"]


class FewValues(NamedTuple):
    """A change of n entries, each of which is 0 or one of few values."""

    labels: Tensor  # uint8 [n]: 0, or the number of the value, from 1
    values: Tensor  # float32 [values]

    def read(self, at: slice) -> Tensor:
        """The change at a slice."""
        return torch.cat([self.values.new_zeros(1), self.values])[self.labels[at].long()]


class Largest:
    """Of the entries of several tensors, worked through in order, the `kept` largest in size; of those that tie, the first."""

    def __init__(self, changes: Entries, kept: int):
        count, values = math.prod(changes.shape), flat(changes)
        self.kept = min(kept, count)
        self.least = -find_cut(lambda at: -values(at).abs(), count, self.kept).value if self.kept else math.inf
        self.ties = self.kept - sum(each(lambda at: int((values(at).abs() > self.least).sum()), count))

    def mark(self, part: Tensor) -> Tensor:
        """Which of the next entries, one vector, stay."""
        sizes = part.abs()
        found = sizes > self.least
        equal = (sizes == self.least).nonzero()[: self.ties, 0]
        self.ties -= len(equal)
        found[equal] = True
        return found


def deviation(changes: Entries) -> float:
    """The standard deviation of all entries, sums in float64; 0 of one entry."""
    count, values = math.prod(changes.shape), flat(changes)
    mean = sum(each(lambda at: float(values(at).sum(dtype=torch.float64)), count)) / max(count, 1)
    return math.sqrt(sum(each(lambda at: float((values(at).double() - mean).square().sum()), count)) / max(count - 1, 1))


def signs(part: Tensor, kept: Tensor, size: float) -> FewValues:
    """The signs of the entries that are kept, times a size. part: [n]; kept: bool [n]."""
    labels = torch.where(part < 0, 1, 2).to(torch.uint8) * (kept & (part != 0))
    return FewValues(labels, torch.tensor([-size, size]))


def clustered(part: Tensor, kept: Tensor, levels: int, steps: int) -> FewValues:
    """The entries that are kept at the nearest of so many values of k-means, of which one is 0 and each sign has half of the others.

    Lloyd's steps, for each sign by itself. They begin with the means of equally many entries each, and never raise the error.
    """
    labels, values = torch.zeros(len(part), dtype=torch.uint8), torch.zeros(levels - 1)
    for number, sign in enumerate((-1, 1)):
        own = (kept & (part * sign > 0)).nonzero().view(-1)
        sizes = part[own].abs().double()
        rising = sizes.sort().values
        means = _lloyd(rising, (levels - 1) // 2, steps)
        if len(means):
            first = number * ((levels - 1) // 2)
            values[first : first + len(means)] = sign * means.float()
            nearest = torch.bucketize(sizes, _middles(means))
            labels[own] = torch.where(nearest > 0, nearest + first, 0).to(torch.uint8)
    return FewValues(labels, values)


def _lloyd(rising: Tensor, count: int, steps: int) -> Tensor:
    """At most `count` rising means of positive values [n], sorted; values nearer to 0 than to the least of them belong to none."""
    sums = torch.cat([rising.new_zeros(1), rising.cumsum(0)])
    bounds = torch.arange(count + 1) * len(rising) // count
    means = _means(sums, bounds)
    for _ in range(steps):
        inner = torch.searchsorted(rising, _middles(means), right=True)
        bounds = torch.cat([inner, inner.new_tensor([len(rising)])])
        after = _means(sums, bounds)
        if torch.equal(after, means):
            break
        means = after
    return means


def _means(sums: Tensor, bounds: Tensor) -> Tensor:
    """The means between neighbouring bounds, by cumulated sums; none where nothing lies between."""
    counts = bounds.diff()
    return (sums[bounds].diff() / counts)[counts > 0]


def _middles(means: Tensor) -> Tensor:
    """The middles between 0 and the first of rising means, and between each and the next."""
    return (torch.cat([means.new_zeros(1), means])[:-1] + means) / 2


def with_feedback(change: Tensor, residual: Tensor | None, code: Callable[[Tensor], FewValues]) -> tuple[FewValues, Tensor]:
    """Code a change [n] together with what the rounds before have lost, and what this one loses, [n].

    Seide et al. 2014, 1-bit stochastic gradient descent: what is lost is sent with the next change, so that sums stay near.
    """
    wanted = change if residual is None else change + residual
    found = code(wanted)
    return found, wanted - found.read(slice(0, len(wanted)))


# Bytes


def encode(change: FewValues, code: Code) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors that store a change, and the numbers that are needed to read them.

    rice: gaps between entries that are not 0 (`golomb_rice`), and which value each has. huffman: a prefix code of all labels.
    masks: a bit of each entry for every value.
    """
    labels, count = change.labels, len(change.labels)
    if code == "huffman":
        coded = prefix_codes.encode(labels, prefix_codes.code_lengths(prefix_codes.histogram(labels, len(change.values) + 1)))
        return coded._asdict() | {"values": change.values}, {"code": code}
    if code == "masks":
        return {"masks": torch.stack([packed(labels == label) for label in range(1, len(change.values) + 1)]), "values": change.values}, {
            "code": code
        }
    places = labels.nonzero().view(-1)
    b = golomb_rice.parameter(len(places) / count) if count else 0
    ones, lower = golomb_rice.encode(places, b)
    width = (len(change.values) - 1).bit_length()
    which = ((labels[places].long() - 1).unsqueeze(1) >> torch.arange(width)) & 1
    parts = {"ones": ones, "lower": lower, "which": packed(which.bool().view(-1)), "values": change.values}
    return parts, {"code": code, "lower": b, "nonzeros": len(places)}


def parts_of(code: Code) -> tuple[str, ...]:
    """The names of the tensors that `encode` gives."""
    return {"rice": ("ones", "lower", "which", "values"), "huffman": (*Coded._fields, "values"), "masks": ("masks", "values")}[code]


def decode(parts: dict[str, Tensor], numbers: dict[str, Any], count: int) -> FewValues:
    """The change of `count` entries that `encode` was given.

    Raises WeightsError when the parts are damaged.
    """
    values = parts["values"]
    if numbers["code"] == "huffman":
        return _within(FewValues(prefix_codes.decode(Coded(*(parts[name] for name in Coded._fields)), count), values))
    labels = torch.zeros(count, dtype=torch.uint8)
    if numbers["code"] == "masks":
        for label, mask in enumerate(parts["masks"], 1):
            labels[unpacked(mask, count)] = label
        return FewValues(labels, values)
    places = golomb_rice.decode(parts["ones"], parts["lower"], numbers["lower"], numbers["nonzeros"])
    if len(places) and places[-1] >= count:
        raise WeightsError(f"A change of {count:,} entries has one at {int(places[-1]):,}. The file is damaged; fetch it again.")
    width = (len(values) - 1).bit_length()
    which = unpacked(parts["which"], len(places) * width).view(len(places), width).long() << torch.arange(width)
    labels[places] = (which.sum(1) + 1).to(torch.uint8)
    return _within(FewValues(labels, values))


def _within(change: FewValues) -> FewValues:
    if len(change.labels) and int(change.labels.max()) > len(change.values):
        raise WeightsError(f"A change has an entry of value {int(change.labels.max())} of {len(change.values)}. The file is damaged.")
    return change

"""Positions of single entries in a vector: drawn, or those of the largest."""

from __future__ import annotations

import torch
from torch import Tensor

from modelwright.maths.slices import Values

CHUNK = 1 << 22  # entries that are looked at in one go
FEW = 4  # draws that are thrown away are cheaper than a permutation up to one of so many entries


def index_dtype(entries: int) -> torch.dtype:
    """The narrowest of int32 and int64 that counts so many entries."""
    return torch.int32 if entries < 2**31 else torch.int64


def drawn(entries: int, count: int, like: Tensor) -> Tensor:
    """`count` different positions of `entries`, all sets as likely, in order; on the device of `like`, and empty where that is.

    From torch's own generator; where they are few, in memory for them alone.
    """
    if like.is_meta:
        return torch.empty(count, dtype=index_dtype(entries), device="meta")
    if count * FEW > entries:
        found = torch.randperm(entries, device="cpu")[:count].sort().values
    else:
        found = torch.empty(0, dtype=torch.int64, device="cpu")
        while len(found) < count:  # what was drawn twice is drawn anew
            found = torch.cat([found, torch.randint(entries, (count - len(found),), device="cpu")]).unique()
    return found.to(like.device, index_dtype(entries))


def largest(values: Values, entries: int, count: int, chunk: int = CHUNK) -> Tensor:
    """The positions [count], in no order, of the largest of `entries` values, of which only a chunk and the best so far are held."""
    best: Tensor | None = None
    places = None
    for start in range(0, entries, chunk):
        part = values(slice(start, min(start + chunk, entries)))
        found = part.topk(min(count, len(part)), sorted=False)
        at = (found.indices + start).to(index_dtype(entries))
        best, places = (found.values, at) if best is None or places is None else (torch.cat([best, found.values]), torch.cat([places, at]))
        if len(best) > count:
            kept = best.topk(count, sorted=False).indices
            best, places = best[kept], places[kept]
    assert places is not None, "a vector without entries has no largest"
    return places

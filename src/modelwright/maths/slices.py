"""Work through tensors a slice at a time, on all cores, so that no copy of a whole one is held.

A large tensor is a function from slices of its flattened entries to their values: of one in memory, `flat.__getitem__`;
of one on disk, a read; of a result, the formula on the same slices of its inputs.
"""

from __future__ import annotations

import bisect
import functools
import itertools
import math
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

SLICE = 1 << 18  # entries worked on at a time, so that they stay in the processor's cache

Values = Callable[[slice], Tensor]  # gives the values at a slice
Found = TypeVar("Found")


class Entries(Protocol):
    """What can be read by slices: a tensor, one on disk (`core.weights.OnDisk`), or one that is computed (`Sliced`)."""

    @property
    def shape(self) -> Any:
        """Its sizes."""

    @property
    def dtype(self) -> torch.dtype:
        """Of its entries."""

    def __getitem__(self, at: slice) -> Tensor:
        """Its entries at a slice; of a tensor in memory, once it is flattened."""


@dataclass(frozen=True)
class Sliced:
    """A tensor of `shape` and `dtype` that is computed when it is asked for: its entries at a slice are `values(at)` in `dtype`."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    values: Values

    def __getitem__(self, at: slice) -> Tensor:
        return self.values(at).to(self.dtype)

    def __iter__(self) -> Iterator[Tensor]:
        """Its slices in order, as they are to be stored."""
        return each(self.__getitem__, math.prod(self.shape))

    def whole(self, out: Tensor | None = None) -> Tensor:
        """The tensor. out: a contiguous tensor for the result; of a formula entry by entry it may be one of the inputs."""
        result = torch.empty(self.shape, dtype=self.dtype) if out is None else out
        flat = result.view(-1)
        for at, part in zip(slices(flat.numel()), self, strict=True):
            flat[at] = part
        return result


class Joined:
    """Tensors one after another as one vector, read by slices; of a dtype that holds all of theirs."""

    def __init__(self, parts: Sequence[Entries]):
        self.ends = list(itertools.accumulate(math.prod(part.shape) for part in parts))
        self.shape = (self.ends[-1],)
        self.dtype = functools.reduce(torch.promote_types, (part.dtype for part in parts))
        self._values = [flat(part) for part in parts]

    def __getitem__(self, at: slice) -> Tensor:
        found, start = [], at.start
        number = bisect.bisect_right(self.ends, start)
        while start < at.stop:
            begin = self.ends[number - 1] if number else 0
            stop = min(at.stop, self.ends[number])
            found.append(self._values[number](slice(start - begin, stop - begin)).to(self.dtype))
            start, number = stop, number + 1
        return torch.cat(found)


def flat(tensor: Entries) -> Values:
    """The values of a tensor by slices of its flattened entries."""
    return (tensor.detach().reshape(-1) if isinstance(tensor, Tensor) else tensor).__getitem__


class Stacked:
    """Values at a slice one below the other [n, entries], in a dtype that may be wider than theirs.

    Each thread has memory of its own, in which the next slice replaces the last: new memory for each slice would cost more
    than sums over it.
    """

    def __init__(self, parts: Sequence[Values], dtype: torch.dtype):
        self.parts, self.dtype = parts, dtype
        self._held = threading.local()

    def read(self, at: slice) -> list[Tensor]:
        """The values as they are."""
        return [part(at) for part in self.parts]

    def __call__(self, at: slice) -> Tensor:
        return self.widened(self.read(at))

    def widened(self, read: Sequence[Tensor]) -> Tensor:
        """What was read at a slice, one below the other, until the thread's next slice."""
        if not hasattr(self._held, "rows") or self._held.rows.shape[1] < len(read[0]):
            self._held.rows = torch.empty(len(read), len(read[0]), dtype=self.dtype, device=read[0].device)
        rows: Tensor = self._held.rows[:, : len(read[0])]
        for row, one in zip(rows, read, strict=True):
            row.copy_(one)
        return rows


def halves(read: Sequence[Tensor]) -> tuple[Any, ...]:
    """Tensors in bfloat16 as whole numbers of 16 bits in the same memory, for compiled loops; none if one of them is otherwise stored."""
    if any(one.dtype != torch.bfloat16 or one.device.type != "cpu" or not one.is_contiguous() for one in read):
        return ()
    return tuple(one.view(torch.uint16).numpy() for one in read)


def slices(count: int, size: int | None = None) -> list[slice]:
    """The slices in which `count` values are worked through; `size` values in each, by default SLICE."""
    size = SLICE if size is None else size
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def in_order(at: slice) -> bool:
    """Whether a slice is one of those in which values are worked through, or the beginning of one."""
    return at.start % SLICE == 0 and at.stop - at.start <= SLICE


def each(work: Callable[[slice], Found], count: int, size: int | None = None) -> Iterator[Found]:
    """What `work` returns for each slice of `count` values, in order, a few slices ahead of the reader.

    Slices run beside each other on as many threads as torch uses; inside one, and for the reader meanwhile, torch keeps
    to a single thread. Shared out this way, no thread waits for another after each operation, and those that torch has
    for the reader's own do not spin on cores that the slices need.
    """
    places = slices(count, size)
    threads = min(torch.get_num_threads(), len(places))
    work = torch.no_grad()(work)
    if threads < 2:
        yield from map(work, places)
        return
    known = torch.get_num_threads()
    waiting: deque[Future[Found]] = deque()
    pool = _pool(known)
    _alone()
    try:
        for at in places:
            waiting.append(pool.submit(work, at))
            if len(waiting) > 2 * threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        wait([future for future in waiting if not future.cancel()])
        torch.set_num_threads(known)  # a thread's number is also what threads made after it begin with


@functools.lru_cache(maxsize=1)
def _pool(threads: int) -> ThreadPoolExecutor:
    """The threads of `each`, kept from one tensor to the next: to start them takes as long as a small tensor's work."""
    pool, all_there = ThreadPoolExecutor(threads, initializer=_alone), threading.Barrier(threads)
    list(pool.map(lambda _: all_there.wait(), range(threads)))  # so that none sets its number later, after the reader has restored his
    return pool


def _alone() -> None:
    torch.set_num_threads(1)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)  # a child has no such threads

"""The decoder of `prefix_codes` for accelerators: a program for each block, whose lanes decode beside each other."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _read(  # type: ignore[no-untyped-def]
    halves, starts, table, blocks, signs, rest, out, ends, count, spare,
    exponent: tl.constexpr, mantissa: tl.constexpr, below: tl.constexpr, merges: tl.constexpr,
    longest: tl.constexpr, most: tl.constexpr, steps: tl.constexpr,
):  # fmt: skip
    """`halves` are the words' 32 bits; two of them, aligned, hold any window. Step k of all lanes writes entries that lie together."""
    number = tl.program_id(0).to(tl.int64)
    block = tl.load(blocks + number)
    size = tl.minimum(count - block * most * steps, most * steps)
    lanes = tl.minimum((size + steps - 1) // steps, most)
    lane = tl.arange(0, most)
    place = tl.load(starts + block * most + lane, mask=lane < lanes, other=0)
    for step in range((size + lanes - 1) // lanes):
        to = step * lanes + lane
        some = (lane < lanes) & (to < size)
        half = tl.minimum(place >> 5, spare)
        low = tl.load(halves + half).to(tl.int64) & 0xFFFFFFFF
        high = tl.load(halves + half + 1).to(tl.int64) & 0xFFFFFFFF
        entry = tl.load(table + (((low | (high << 32)) >> (place & 31)) & ((1 << longest) - 1))).to(tl.int64)
        value = entry & 255
        at = number * most * steps + to
        if merges:
            sign = tl.load(signs + at, mask=some, other=0).to(tl.int64)
            value = ((sign >> mantissa) << (mantissa + exponent)) | (value << mantissa) | (sign & ((1 << mantissa) - 1))
        if below:
            value = (value << below) | (tl.load(rest + at, mask=some, other=0).to(tl.int64) & ((1 << below) - 1))
        tl.store(out + at, value.to(out.dtype.element_ty), mask=some)
        place += tl.where(some, entry >> 8, 0)
    tl.store(ends + number * most + lane, place, mask=lane < lanes)


def read(codes: Tensor, starts: Tensor, table: Tensor, blocks: Tensor, count: int, signs: Tensor | None, rest: Tensor | None,
         split: tuple[int, int], out: Tensor, sizes: tuple[int, int, int]) -> Tensor:  # fmt: skip
    """Decode blocks, int64 [blocks], into `out`; returns where each of their lanes ended, int64 [blocks, lanes], -1 where there is none.

    sizes: the longest code, the lanes of a block, the steps of a lane.
    """
    halves = codes.view(torch.int32)
    ends = torch.full((len(blocks), sizes[1]), -1, device=out.device)
    empty: Any = out  # a pointer that is not followed
    _read[(len(blocks),)](
        halves, starts, table, blocks, empty if signs is None else signs, empty if rest is None else rest, out, ends, count,
        len(halves) - 2, *split, 0 if rest is None else 8 * rest.element_size(), signs is not None, *sizes, num_warps=2,
    )  # fmt: skip
    return ends

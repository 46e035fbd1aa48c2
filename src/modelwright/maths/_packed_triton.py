"""Products with codes of 4 bits for accelerators: a program for each few rows of the weight, whose codes it reads once for all inputs."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

TALL, WIDE = 16, 128  # rows of a program, and bytes of each that are worked on together
NONE, FLOAT, WORDS, LEVELS = range(4)  # zero points of 8, floats, in packed words; a table in their place


@triton.jit
def _plus(one, other):  # type: ignore[no-untyped-def]
    return one + other


@triton.jit
def _products(  # type: ignore[no-untyped-def]
    packed, scale, shift, x, out, rows, half, stride, groups,
    kind: tl.constexpr, count: tl.constexpr, width: tl.constexpr, tall: tl.constexpr, wide: tl.constexpr,
):  # fmt: skip
    """`half` is the bytes of a row that hold codes, `stride` all; x float32 [count, 2, half], the even columns and the odd ones."""
    row = (tl.program_id(0) * tall + tl.arange(0, tall)).to(tl.int64)[:, None]
    one = tl.arange(0, width)[None, :]
    total = tl.full((tall, width), 0.0, tl.float32)
    for start in range(0, half, wide):
        place = start + tl.arange(0, wide)[None, :]
        inside = (row < rows) & (place < half)
        code = tl.load(packed + row * stride + place, mask=inside, other=0)
        group = place // (half // groups)
        step = tl.load(scale + row * groups + group, mask=inside, other=0).to(tl.float32)
        low, high = code & 15, code >> 4
        if kind == 3:
            low, high = tl.load(shift + low), tl.load(shift + high)
        else:
            zero = tl.full((tall, wide), 8.0, tl.float32)
            if kind == 1:
                zero += tl.load(shift + row * groups + group, mask=inside, other=0).to(tl.float32)
            if kind == 2:
                word = tl.load(shift + row // 8 * groups + group, mask=inside, other=0)
                zero = ((word >> (row % 8 * 4).to(tl.int32)) & 15).to(tl.float32)
            low, high = low.to(tl.float32) - zero, high.to(tl.float32) - zero
        for number in tl.static_range(count):
            even = tl.load(x + 2 * number * half + place, mask=place < half, other=0)
            odd = tl.load(x + (2 * number + 1) * half + place, mask=place < half, other=0)
            found = tl.reduce((low * even + high * odd) * step, 1, _plus)
            total += tl.where(one == number, found[:, None], 0.0)
    tl.store(out + one * rows + row, total, mask=(row < rows) & (one < count))


def products(packed: Tensor, scale: Tensor, zero: Tensor | None, table: Tensor | None, x: Tensor) -> Tensor:
    """Float32 [count, out] of x float32 [count, 2, in / 2] and codes, bytes [out, ...], as `packed_products.product` has them."""
    rows, groups = scale.shape
    kind = LEVELS if table is not None else NONE if zero is None else FLOAT if zero.is_floating_point() else WORDS
    out = torch.empty(len(x), rows, device=x.device)
    shift: Any = table if table is not None else x if zero is None else zero.contiguous()  # a pointer that is not followed without either
    _products[(-(-rows // TALL),)](
        packed, scale.contiguous(), shift, x, out, rows, x.shape[2], packed.shape[1], groups,
        kind, len(x), 1 << (len(x) - 1).bit_length(), TALL, WIDE,
    )  # fmt: skip
    return out

"""Products of few inputs with packed weights, straight from the codes: no weight of full precision is made.

A step of decoding reads each weight once, so that its time is that of reading them; codes of 4 or 8 bits are a quarter or a half
of what 16-bit floats are. The processor's loops are compiled by numba, those for CUDA by triton, whose speed is not measured yet.
"""

from __future__ import annotations

import functools
import math
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.autograd import forward_ad

from modelwright.maths._kernels import kernels

ROWS = 8  # more inputs than this make it worth to have the weight
LEAST = 1 << 15  # weights; a smaller matrix is unpacked in less time than a compiler takes to load
LANES = 16  # numbers that are multiplied at once, where a group has a multiple of them
VECTORS = 8  # of so many, that are added up one after the other
SHARE = 1 << 19  # weights for which a thread of its own is worth waking
compiled = functools.partial(kernels, "_packed_kernels")
accelerated = functools.partial(kernels, "_packed_triton")


def product(
    inputs: Tensor, packed: Tensor, bits: int, scale: Tensor, zero: Tensor | None = None, table: Tensor | None = None
) -> Tensor | None:
    """inputs [..., in] times the transposed weights (code - zero) · scale, or table[code] · scale: [..., out] in the inputs' dtype.

    packed: the streams of `rounding.pack` as int32 or bytes [out, ...]. scale [out, groups]. zero: float [out, groups] for signed
    codes; or int32 [ceil(out · bits / 32), groups], packed along the rows. table: float32 [16]. Sums and weights are in float32.

    Returns None where the weights must be made dense instead: for many inputs, for which no gain is to be had; a small matrix; other
    numbers of bits than 4 and, on the processor and without a table, 8; groups that end inside a byte; inputs, scales, zeros or tables
    that a gradient is wanted of, or that stand for others, as those of `vmap`; a device that is neither the processor nor one of CUDA's;
    missing numba or triton.
    """
    size, (rows, groups) = inputs.shape[-1], scale.shape
    fits = bits in (4, 8) and (table is None or (bits, len(table)) == (4, 16)) and size * bits % (8 * groups) == 0 and rows * size >= LEAST
    if not fits or not 0 < inputs.numel() <= ROWS * size or torch.compiler.is_compiling():
        return None
    if not all(map(_plain, (values for values in (inputs, scale, zero, table) if values is not None))):
        return None
    work = {"cpu": _on_processor, "cuda": _on_accelerator}.get(inputs.device.type)
    with torch.no_grad():
        out = None if work is None else work(inputs.reshape(-1, size).float(), packed, bits, scale, zero, table)
        return None if out is None else out.to(inputs.dtype).view(*inputs.shape[:-1], rows)


def _plain(values: Tensor) -> bool:
    """Whether only the numbers of a tensor are wanted."""
    followed = torch.is_grad_enabled() and values.requires_grad
    stands_for_others = type(values) not in (Tensor, torch.nn.Parameter) or is_functorch_wrapped_tensor(values)
    return not (followed or stands_for_others or forward_ad._current_level >= 0 and forward_ad.unpack_dual(values).tangent is not None)


def _on_processor(x: Tensor, packed: Tensor, bits: int, scale: Tensor, zero: Tensor | None, table: Tensor | None) -> Tensor | None:
    """The products with x float32 [count, in], float32 [count, out]; None where numba is missing."""
    if (kernels := compiled()) is None:
        return None
    rows, groups = scale.shape
    codes, parted, out = _bytes(packed).numpy(), _apart(x, bits), x.new_empty(len(x), rows)
    if table is not None:
        work = functools.partial(kernels.levels, codes, _numbers(scale), table.numpy(), parted.numpy(), out.numpy())
    else:
        lanes, parts = _divided(parted.shape[2] // groups)
        sums = x.view(len(x), groups, -1).sum(-1)
        parted[:, 1:] /= 16  # the second code of a byte is read as 16 times itself
        given = [codes, _numbers(scale), _numbers(zero), *(values.numpy() for values in (parted, sums, out))]
        work = functools.partial(kernels.integers, *given, parts, (0,) * lanes, (0,) * parted.shape[1])
    _shared(work, rows, x.shape[1] * rows)
    return out


def _divided(size: int) -> tuple[int, int]:
    """How many bytes of a group of `size` are taken at once, and into how many parts it falls whose sums begin beside each other."""
    lanes, parts = math.gcd(size, LANES), 1
    while (vectors := size // (lanes * parts)) > VECTORS and vectors % 2 == 0:
        parts *= 2
    return lanes, parts


def _on_accelerator(x: Tensor, packed: Tensor, bits: int, scale: Tensor, zero: Tensor | None, table: Tensor | None) -> Tensor | None:
    """The same by a kernel of triton; None where it is missing, or bits are not 4."""
    if bits != 4 or (kernels := accelerated()) is None:
        return None
    with torch.cuda.device_of(x):  # triton runs on the current one
        found: Tensor = kernels.products(_bytes(packed), scale, zero, table, _apart(x, bits))
        return found


def _apart(x: Tensor, bits: int) -> Tensor:
    """x [count, in] as [count, codes in a byte, in / these]: the inputs of the first code of each byte, then of the second."""
    return x.view(len(x), -1, 8 // bits).transpose(1, 2).contiguous()


def _numbers(values: Tensor | None) -> Any:
    """As the kernels take them: bfloat16 as the upper halves of float32, words as their bytes."""
    if values is None:
        return None
    if values.dtype == torch.bfloat16:
        return values.detach().view(torch.uint16).numpy()
    if values.dtype == torch.int32:
        return _bytes(values).numpy()
    return values.detach().float().numpy()


def _bytes(words: Tensor) -> Tensor:
    """Words [rows, columns] as their bytes; a matrix of one column calls any stride contiguous, hence the second question."""
    whole = words.is_contiguous() and words.stride(-1) == 1
    return (words if whole else words.clone(memory_format=torch.contiguous_format)).view(torch.uint8)


def _shared(work: Any, rows: int, weights: int) -> None:
    """Call work(first, last) for all rows, on as many threads as torch uses; this one does its part."""
    threads = max(1, min(torch.get_num_threads(), weights // SHARE, rows))
    ends = [rows * part // threads for part in range(threads + 1)]
    others = [_pool().submit(work, ends[part], ends[part + 1]) for part in range(1, threads)]
    work(0, ends[1])
    for other in others:
        other.result()


@functools.cache
def _pool() -> ThreadPoolExecutor:
    """Threads that stay, as a step of decoding is shorter than starting them takes."""
    return ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="packed")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)  # a forked process has none of them

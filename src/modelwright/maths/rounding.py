"""Affine integer grids: scales, codes, and the dense bit stream that stores the codes.

weight [out, in] ≈ (code - zero) · scale, where each row is cut into groups of `group` consecutive columns that share
a scale and, on an asymmetric grid, a zero point. Codes are signed, from -2^(bits-1) to 2^(bits-1) - 1.
Layout of the stored bits: compressed-tensors 0.20, format pack-quantized.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from modelwright.maths._kernels import kernels
from modelwright.maths.slices import SLICE, each, slices

CLIPS = 80  # clipping factors that the search tries: 1.00, 0.99, ..., 0.21
NORM = 2.4  # the power of the error that it minimises
Found = TypeVar("Found")
LEAST_STEP = 1 / 2e4  # of a group's largest size, between its levels in half-quadratic splitting
ROWS = 256  # whose codes are found together, so that no float copy of all of them is made
LEAST = 1 << 18  # weights; of a smaller matrix whole-array operations take less time than a compiler takes to load
compiled = functools.partial(kernels, "_rounding_kernels")


def scales(
    weight: Tensor, bits: int, group: int | None = None, *, symmetric: bool = True, mse: bool = False, even: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Choose each group's scale, and its zero point when the grid is asymmetric.

    weight: [out, in]; `in` is a multiple of `group`. group: columns that share a scale; None is the whole row.
    symmetric: scale = max|w| / ((2^bits - 1) / 2), so that the grid's full range is used; else the range from the
        least to the greatest weight, with 0 in it, is cut into 2^bits - 1 steps.
    even: of a symmetric grid, as many steps below zero as above: scale = max|w| / (2^(bits-1) - 1).
    mse: also try ranges shrunk by 1 to 79 percent, and keep the one with the least Σ|error|^2.4.

    Returns (scale [out, groups] in weight's dtype and always above 0, zero [out, groups] int8 or None).
    Source: IST-DASLab/gptq quant.py; compressed-tensors for the symmetric range.
    """
    own = functools.partial(_scales, groups=weight.shape[1] // (group or weight.shape[1]), kernels=_kernels(weight))
    found = _by_rows(lambda at: own(weight[at], bits=bits, symmetric=symmetric, mse=mse, even=even), weight)
    zeros = [zero for _, zero in found if zero is not None]
    return torch.cat([scale for scale, _ in found]), torch.cat(zeros) if zeros else None


def _scales(
    weight: Tensor, groups: int, kernels: Any, *, bits: int, symmetric: bool, mse: bool, even: bool
) -> tuple[Tensor, Tensor | None]:
    low, high = _bounds(weight, groups, kernels)
    low, high = low.clamp_(max=0), high.clamp_(min=0)
    if symmetric:
        high = torch.maximum(high, low.neg_())
        low = -high
    scale, zero = _scale(low, high, bits, symmetric, weight.dtype, even)
    if not mse:
        return scale, zero
    grouped = _grouped(weight, groups).float()
    least = _error(grouped, scale, zero, bits)
    for step in range(1, CLIPS):
        shrunk = 1 - step / 100
        other, other_zero = _scale(low * shrunk, high * shrunk, bits, symmetric, weight.dtype, even)
        error = _error(grouped, other, other_zero, bits)
        better = error < least
        least = torch.where(better, error, least)
        scale = torch.where(better, other, scale)
        zero = zero if zero is None or other_zero is None else torch.where(better, other_zero, zero)
    return scale, zero


def half_quadratic(
    weight: Tensor, bits: int, group: int | None = None, *,
    power: float = 0.7, strength: float = 10.0, growth: float = 1.01, iterations: int = 20,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Scales of the groups' ranges, and float zero points for which Σ|w - ŵ|^power is small: half-quadratic splitting.

    weight: [out, in]. strength: β, how closely what is left must be met, times `growth` after each of at most `iterations` steps.
    Each group keeps the zero point with which its mean error was the least, whatever the steps after it did. ROWS rows are worked
    on together, and end when their mean error no longer falls.

    Returns (scale [out, groups], zero [out, groups]), both in weight's dtype, the zero points for signed codes.
    Source: Badri, Shaji 2023, "Half-Quadratic Quantization of Large Machine Learning Models".
    """
    own = functools.partial(_half_quadratic, bits=bits, group=group, power=power, strength=strength, growth=growth, iterations=iterations)
    scale, zero = zip(*map(own, weight.split(ROWS)), strict=True)
    return torch.cat(scale), torch.cat(zero)


def _half_quadratic(
    weight: Tensor, bits: int, group: int | None, power: float, strength: float, growth: float, iterations: int
) -> tuple[Tensor, Tensor]:
    grouped = _grouped(weight, weight.shape[1] // (group or weight.shape[1])).float()
    low, high, half = grouped.amin(-1), grouped.amax(-1), 2 ** (bits - 1)
    largest = torch.maximum(low.abs(), high.abs())
    scale = torch.maximum((high - low) / (2**bits - 1), largest * LEAST_STEP).to(weight.dtype).clamp_(min=smallest_scale(weight.dtype))
    step = scale.float().unsqueeze(-1)
    zero = -low / scale.float() - half
    zero = (zero.round() if bits == 4 else zero).to(weight.dtype)
    best, least, before = zero, torch.full_like(low, torch.inf), torch.inf
    for _ in range(iterations + 1):
        codes = (grouped / step + zero.float().unsqueeze(-1)).round_().clamp_(-half, half - 1)
        apart = grouped - (codes - zero.float().unsqueeze(-1)) * step
        error = apart.abs().mean(-1)
        best, least = torch.where(error < least, zero, best), torch.minimum(error, least)
        if (total := error.mean().item()) >= before:
            break
        before = total
        size = apart.abs()
        sparse = apart.sign() * (size - size.clamp(min=1e-30).pow(power - 1) / strength).clamp_(min=0)
        zero = (codes - (grouped - sparse) / step).mean(-1).to(weight.dtype)
        strength *= growth
    return scale, best


def smallest_scale(dtype: torch.dtype) -> float:
    """The smallest scale of a dtype: groups of zeros have it too. Of float16 a subnormal number, since weights are often so small."""
    found = torch.finfo(dtype)
    return found.smallest_normal * found.eps if dtype == torch.float16 else found.tiny


def encode(weight: Tensor, scale: Tensor, zero: Tensor | None, bits: int) -> Tensor:
    """The nearest codes, halves to even: round(weight / scale) + zero, clipped; int8 [out, in].

    weight [out, in], scale and zero [out, groups] as `scales` gives them.
    """
    kernels = _kernels(weight)
    codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    if weight.device.type == "cpu":
        codes = torch.from_numpy(np.empty(weight.shape, np.int8))  # numpy asks for large pages

    def work(at: slice) -> None:
        own = weight[at].detach(), scale[at].detach(), None if zero is None else zero[at].detach()
        if kernels is None:
            codes[at] = _codes(_grouped(own[0], scale.shape[1]), *own[1:], bits).view(-1, weight.shape[1])
        else:
            _nearest(kernels, *own, bits, codes[at])

    _by_rows(work, weight)
    return codes


def decode(codes: Tensor, scale: Tensor, zero: Tensor | None = None, dtype: torch.dtype | None = None) -> Tensor:
    """The weights that codes stand for, (code - zero) · scale: [out, in] in `dtype`, by default scale's.

    codes int8 [out, in], scale and zero [out, groups]; zero is a whole number, or a float. The product is rounded once, to scale's
    dtype.
    """
    whole = zero is None or not zero.is_floating_point()
    grouped = _grouped(codes, scale.shape[1]).to(scale.dtype if whole else torch.float32)
    if zero is not None:
        grouped -= zero.to(grouped.dtype).unsqueeze(-1)
    return grouped.mul_(scale.unsqueeze(-1)).view(codes.shape).to(dtype or scale.dtype)


def rounded_rows(x: Tensor, bits: int, *, even: bool = True) -> tuple[Tensor, Tensor]:
    """Whole numbers for each row of inputs, with a scale of its own: (int8 [rows, in], float32 [rows, 1]).

    even: as many steps below zero as above, scale = max|x| / (2^(bits-1) - 1); else the full range of the codes is used, as by
    compressed-tensors: max|x| / ((2^bits - 1) / 2).
    """
    most = 2 ** (bits - 1) - 1
    scale = (x.abs().amax(-1, keepdim=True).float() / (most if even else most + 0.5)).clamp_(min=torch.finfo(torch.float32).tiny)
    return (x.float() / scale).round_().clamp_(-most if even else -most - 1, most).to(torch.int8), scale


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, rounded: Tensor) -> Tensor:
        return rounded.clone()

    @staticmethod
    def backward(ctx: Any, *outward: Tensor) -> tuple[Tensor, None]:
        return outward[0], None


def straight_through(values: Tensor, rounded: Tensor) -> Tensor:
    """`rounded`, to the bit, whose gradient goes to `values` of the same shape as it is (Bengio et al. 2013, arXiv:1308.3432)."""
    return _StraightThrough.apply(values, rounded)  # type: ignore[no-any-return, no-untyped-call]


def pack(codes: Tensor, bits: int) -> Tensor:
    """Store each row of signed codes as a dense stream of bits, lowest first, in 32-bit words.

    codes: int8 [out, in], each from -2^(bits-1) to 2^(bits-1) - 1; stored with 2^(bits-1) added. Column j takes the
    bits from j · bits of its row's stream; spare bits at a row's end are 0. bits: 1 to 8.

    Returns int32 [out, ceil(in · bits / 32)].
    """
    assert sys.byteorder == "little"
    rows, columns = codes.shape
    words = packed_words(columns, bits)
    values, width = _unit(bits)
    if columns * bits == words * 32 and columns % 8 == 0 and (kernels := _kernels(codes)) is not None:
        out, given = torch.empty(rows, words, dtype=torch.int32), codes.contiguous().view(torch.uint8)
        loop = kernels.nibbles if bits == 4 else functools.partial(kernels.streams, bits)
        _by_rows(lambda at: loop(given[at].numpy(), out[at].view(torch.uint8).numpy()), codes)
        return out
    units = -(-words * 4 // width)
    unsigned = codes.new_zeros(rows, units * values, dtype=torch.uint8)
    unsigned[:, :columns] = codes.view(torch.uint8) + (1 << (bits - 1))
    unsigned = unsigned.view(rows, units, values)
    stream = unsigned.new_zeros(rows, units, width)
    for index in range(values):
        byte, shift = divmod(index * bits, 8)
        stream[..., byte] |= unsigned[..., index] << shift
        if shift + bits > 8:
            stream[..., byte + 1] |= unsigned[..., index] >> (8 - shift)
    return stream.view(rows, -1)[:, : words * 4].reshape(-1).view(torch.int32).view(rows, words)


def unpack(packed: Tensor, bits: int, columns: int) -> Tensor:
    """The codes that `pack` stored: int32 [out, words] → int8 [out, columns]."""
    rows = packed.shape[0]
    values, width = _unit(bits)
    stream = packed.contiguous().view(torch.uint8)
    units = -(-columns // values)
    stream = torch.nn.functional.pad(stream, (0, max(0, units * width - stream.shape[1])))
    stream = stream[:, : units * width].reshape(rows, units, width)
    unsigned = stream.new_empty(rows, units, values)
    for index in range(values):
        byte, shift = divmod(index * bits, 8)
        value = stream[..., byte] >> shift
        if shift + bits > 8:
            value |= stream[..., byte + 1] << (8 - shift)
        unsigned[..., index] = value
    unsigned &= (1 << bits) - 1
    unsigned -= 1 << (bits - 1)
    return unsigned.view(rows, -1)[:, :columns].view(torch.int8)


def pack_bytes(codes: Tensor, bits: int) -> Tensor:
    """Store rows of codes from 0 to 2^bits - 1 as a dense stream of bits, lowest first, in bytes.

    codes: uint8 [rows, columns]. Returns uint8 [rows, ceil(columns · bits / 8)].
    """
    signed = (codes.to(torch.int16) - (1 << (bits - 1))).to(torch.int8)
    return pack(signed, bits).view(torch.uint8)[:, : -(-codes.shape[1] * bits // 8)].contiguous()


def unpack_bytes(stream: Tensor, bits: int, columns: int) -> Tensor:
    """The codes that `pack_bytes` stored: uint8 [rows, columns]."""
    return unpack(stream, bits, columns).to(torch.int16).add_(1 << (bits - 1)).to(torch.uint8)


def packed_words(columns: int, bits: int) -> int:
    """How many 32-bit words a row of codes takes."""
    return -(-columns * bits // 32)


def _kernels(values: Tensor) -> Any:
    """The compiled loops, for matrices whose work takes longer than to load them; None for others, and where numba is missing."""
    fits = values.dtype in (torch.int8, torch.bfloat16, torch.float16, torch.float32) and values.device.type == "cpu"
    return compiled() if fits and values.numel() >= LEAST else None


def _by_rows(work: Callable[[slice], Found], values: Tensor) -> list[Found]:
    """What `work` gives for a few rows of a matrix at a time, beside each other; so no float copy of all of them is made."""
    if not values.numel():
        return [work(slice(0, len(values)))]
    rows = max(1, SLICE // values.shape[1])
    if values.device.type != "cpu":  # other threads would have streams of their own
        return [work(at) for at in slices(len(values), rows)]
    return list(each(work, len(values), rows))


def _bounds(weight: Tensor, groups: int, kernels: Any) -> tuple[Tensor, Tensor]:
    """The least and the greatest weight of each group, float32 [out, groups]; NaN where one is NaN."""
    if kernels is None:
        grouped = _grouped(weight, groups).float()
        return grouped.amin(-1), grouped.amax(-1)
    whole = torch.int32 if weight.dtype == torch.float32 else torch.int16
    numbers = weight.detach().contiguous().view(whole).numpy()
    low, high = (torch.empty(len(weight), groups, dtype=whole) for _ in range(2))
    kernels.bounds(numbers, numbers.dtype.type(torch.iinfo(whole).max), low.numpy(), high.numpy())
    return low.view(weight.dtype).float(), high.view(weight.dtype).float()


def _nearest(kernels: Any, weight: Tensor, scale: Tensor, zero: Tensor | None, bits: int, codes: Tensor) -> None:
    """Fill codes int8 [out, in] with those of `encode`, by a compiled loop."""
    values = (weight.contiguous().view(torch.uint16) if weight.dtype == torch.bfloat16 else weight.float().contiguous()).numpy()
    none = torch.zeros(1, 1).expand(scale.shape)
    before, after = (none, none) if zero is None else (zero.float(), none) if zero.is_floating_point() else (none, zero.float())
    least, most = np.float32(-(2 ** (bits - 1))), np.float32(2 ** (bits - 1) - 1)
    kernels.nearest(values, scale.float().numpy(), before.numpy(), after.numpy(), least, most, codes.numpy())


def _unit(bits: int) -> tuple[int, int]:
    """The fewest codes that fill whole bytes: (codes, bytes)."""
    common = math.gcd(8, bits)
    return 8 // common, bits // common


def _grouped(weight: Tensor, groups: int) -> Tensor:
    assert weight.shape[1] % groups == 0, (weight.shape, groups)
    return weight.reshape(weight.shape[0], groups, -1)


def _scale(low: Tensor, high: Tensor, bits: int, symmetric: bool, dtype: torch.dtype, even: bool) -> tuple[Tensor, Tensor | None]:
    steps = 2**bits - (2 if even else 1)
    most = torch.finfo(dtype).max / 2 ** (bits - 1)  # that no code of finite weights becomes infinite
    exact = (high - low) / steps
    scale = torch.where(exact.isinf(), exact, exact.clamp(max=most)).to(dtype).clamp_(min=smallest_scale(dtype))
    if symmetric:
        return scale, None
    zero = torch.round(-low / scale.float()).clamp_(0, steps) - 2 ** (bits - 1)
    return scale, zero.to(torch.int8)


def _codes(grouped: Tensor, scale: Tensor, zero: Tensor | None, bits: int) -> Tensor:
    """Codes as floats; both operands in float32, so that the scale in its stored dtype decides."""
    codes = grouped.float() / scale.float().unsqueeze(-1)
    if zero is not None and zero.is_floating_point():
        codes += zero.float().unsqueeze(-1)
    codes.round_()
    if zero is not None and not zero.is_floating_point():
        codes += zero.unsqueeze(-1)
    return codes.clamp_(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


def _error(grouped: Tensor, scale: Tensor, zero: Tensor | None, bits: int) -> Tensor:
    values = _codes(grouped, scale, zero, bits)
    if zero is not None:
        values -= zero.unsqueeze(-1)
    return values.mul_(scale.float().unsqueeze(-1)).sub_(grouped).abs_().pow_(NORM).sum(-1)

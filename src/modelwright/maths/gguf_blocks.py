"""The blocks of GGUF files: 32 or 256 consecutive weights of a row, their scales and their codes, as bytes.

x̂ = d · q for Q8_0, Q4_0 and Q5_0; d · scale · q - dmin · least for Q4_K, whose 8 parts of 32 have a scale and a least value of 6 bits
each; d · scale · q for Q6_K, whose 16 parts of 16 have scales of 8 bits. d and dmin are float16.
Source: ggml-org/ggml, ggml-quants.c, whose searches without an importance matrix these are, as a batch and in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

AT_ONCE = 1 << 20  # values that are worked on together
TINY = torch.finfo(torch.float32).tiny


class Form(NamedTuple):
    """A kind of block."""

    values: int  # in a block
    bytes: int  # that it takes
    encode: Callable[[Tensor], Tensor]  # float32 [blocks, values] → uint8 [blocks, bytes]
    decode: Callable[[Tensor], Tensor]  # and back to what is stored


def encode(weight: Tensor, form: str) -> Tensor:
    """A weight [..., in] of any float dtype as blocks of this form, uint8 [..., in / values · bytes]; values divide `in`."""
    kind = FORMS[form]
    blocks = weight.detach().reshape(-1, kind.values)
    parts = [kind.encode(part.float()) for part in blocks.split(max(1, AT_ONCE // kind.values))]
    return torch.cat(parts).view(*weight.shape[:-1], -1)


def decode(stored: Tensor, form: str) -> Tensor:
    """The weights that blocks uint8 [..., bytes] stand for, float32 [..., in]."""
    kind = FORMS[form]
    parts = [kind.decode(part) for part in stored.reshape(-1, kind.bytes).split(max(1, AT_ONCE // kind.values))]
    return torch.cat(parts).view(*stored.shape[:-1], -1)


def _half(numbers: Tensor) -> Tensor:
    """[n] → the bytes of float16, [n, 2]."""
    return numbers.half()[:, None].view(torch.uint8)


def _number(stored: Tensor) -> Tensor:
    """Bytes [n, 2] → float32 [n, 1]."""
    return stored.contiguous().view(torch.float16).float()


def _over(numbers: Tensor) -> Tensor:
    """1 / numbers, and 0 where they are 0."""
    return torch.where(numbers == 0, 0, 1 / torch.where(numbers == 0, 1, numbers))


def _largest(x: Tensor) -> Tensor:
    """The value of the largest size along the last axis, with its sign; of several the first."""
    size = x.abs()
    place = torch.where(size == size.amax(-1, keepdim=True), torch.arange(x.shape[-1], device=x.device), x.shape[-1]).amin(-1, keepdim=True)
    return x.gather(-1, place)[..., 0]


def _nibbles(q: Tensor) -> Tensor:
    """Codes [..., 2, n] below 16 → bytes [..., n]: the first half in the low four bits."""
    return q[..., 0, :] | q[..., 1, :] << 4


def _codes(stored: Tensor) -> Tensor:
    """Bytes [..., n] → codes [..., 2, n]."""
    return torch.stack([stored & 15, stored >> 4], -2)


def _q8_0(x: Tensor) -> Tensor:
    d = x.abs().amax(1) / 127
    scaled = x * _over(d)[:, None]
    q = scaled.sign() * (scaled.abs() + 0.5).floor()  # halves away from 0
    return torch.cat([_half(d), q.to(torch.int8).view(torch.uint8)], 1)


def _from_q8_0(stored: Tensor) -> Tensor:
    return _number(stored[:, :2]) * stored[:, 2:].contiguous().view(torch.int8)


def _q4_0(x: Tensor) -> Tensor:
    d = _largest(x) / -8
    q = (x * _over(d)[:, None] + 8.5).to(torch.uint8).clamp_(max=15)
    return torch.cat([_half(d), _nibbles(q.view(-1, 2, 16))], 1)


def _from_q4_0(stored: Tensor) -> Tensor:
    return _number(stored[:, :2]) * (_codes(stored[:, 2:]).flatten(1).float() - 8)


def _q5_0(x: Tensor) -> Tensor:
    """The fifth bits are in four bytes before the others', value j in bit j."""
    d = _largest(x) / -16
    q = (x * _over(d)[:, None] + 16.5).to(torch.uint8).clamp_(max=31)
    fifth = ((q >> 4).view(-1, 4, 8) << torch.arange(8, dtype=torch.uint8, device=x.device)).sum(-1, dtype=torch.uint8)
    return torch.cat([_half(d), fifth, _nibbles(q.view(-1, 2, 16) & 15)], 1)


def _from_q5_0(stored: Tensor) -> Tensor:
    fifth = (stored[:, 2:6, None] >> torch.arange(8, dtype=torch.uint8, device=stored.device) & 1).flatten(1)
    return _number(stored[:, :2]) * ((_codes(stored[:, 6:]).flatten(1) | fifth << 4).float() - 16)


def _fitted(x: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and least value [n] of x [n, 32] for codes 0 to 15: of 21 ranges that a weighted line is fitted to, the best."""
    weight = x.square().mean(-1, keepdim=True).sqrt() + x.abs()
    low, high = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True)
    whole, of_x = weight.sum(-1), (weight * x).sum(-1)
    scale, least, best = torch.zeros_like(whole), low[:, 0].clone(), (weight * (low - x).square()).sum(-1)
    for step in range(21):
        q = ((14 + step / 10) * _over(high - low) * (x - low)).round_().clamp_(0, 15)
        wq = weight * q
        of_q, of_qq, of_xq = wq.sum(-1), (wq * q).sum(-1), (wq * x).sum(-1)
        apart = whole * of_qq - of_q.square()
        sound = apart > 0
        apart = torch.where(sound, apart, 1)
        slope, start = (whole * of_xq - of_x * of_q) / apart, (of_qq * of_x - of_q * of_xq) / apart
        slope, start = torch.where(start > 0, of_xq / of_qq.clamp(min=TINY), slope), start.clamp(max=0)
        error = (weight * (slope[:, None] * q + start[:, None] - x).square()).sum(-1)
        better = sound & (error < best)
        scale, least, best = (torch.where(better, *pair) for pair in ((slope, scale), (start, least), (error, best)))
    return scale, least


def _sixth(numbers: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers [n, 8] of at least 0 as whole ones up to 63, and what to multiply them by, [n]."""
    largest = numbers.amax(1)
    return (numbers * (63 * _over(largest))[:, None]).round_().clamp_(0, 63).to(torch.uint8), largest / 63


def _q4_k(x: Tensor) -> Tensor:
    parts = x.view(-1, 32)
    scale, least = (found.view(-1, 8) for found in _fitted(parts))
    (ls, d), (lm, dmin) = _sixth(scale), _sixth(-least)
    step, start = (d.half().float()[:, None] * ls).view(-1, 1), (dmin.half().float()[:, None] * lm).view(-1, 1)
    q = ((parts + start) * _over(step)).round_().clamp_(0, 15).to(torch.uint8)  # anew, with what is stored
    small = [ls[:, :4] | ls[:, 4:] >> 4 << 6, lm[:, :4] | lm[:, 4:] >> 4 << 6, ls[:, 4:] & 15 | (lm[:, 4:] & 15) << 4]
    return torch.cat([_half(d), _half(dmin), *small, _nibbles(q.view(-1, 4, 2, 32)).flatten(1)], 1)


def _from_q4_k(stored: Tensor) -> Tensor:
    one, two, both = stored[:, 4:16].view(-1, 3, 4).unbind(1)
    ls = torch.cat([one & 63, both & 15 | one >> 6 << 4], 1)
    lm = torch.cat([two & 63, both >> 4 | two >> 6 << 4], 1)
    q = _codes(stored[:, 16:].view(-1, 4, 32)).view(-1, 8, 32)
    step, start = _number(stored[:, :2]) * ls, _number(stored[:, 2:4]) * lm
    return (step[..., None] * q - start[..., None]).flatten(1)


def _q6_k(x: Tensor) -> Tensor:
    """Of 19 scales, from 31.1 to 32.9 steps to the largest value, the one whose error weighted with x² is the least when fitted."""
    parts = x.view(-1, 16)
    over = _over(_largest(parts))
    scale, best = torch.zeros_like(over), torch.zeros_like(over)
    for tenth in range(-9, 10):
        q = (-(32 + tenth / 10) * over[:, None] * parts).round_().clamp_(-32, 31)
        of_xq, of_qq = (parts.pow(3) * q).sum(-1), (parts * q).square().sum(-1)
        gain = of_xq.square() * _over(of_qq)  # what a scale of of_xq / of_qq takes off the error
        scale, best = torch.where(gain > best, of_xq * _over(of_qq), scale), torch.maximum(gain, best)
    scale = scale.view(-1, 16)
    d = _largest(scale) / -128
    small = (scale * _over(d)[:, None]).round_().clamp_(-128, 127).to(torch.int8)
    step = (d.half().float()[:, None] * small).view(-1, 1)
    q = ((parts * _over(step)).round_().clamp_(-32, 31) + 32).to(torch.uint8).view(-1, 2, 4, 32)
    low = torch.stack([q[:, :, 0] & 15 | (q[:, :, 2] & 15) << 4, q[:, :, 1] & 15 | (q[:, :, 3] & 15) << 4], 2)
    high = q[:, :, 0] >> 4 | q[:, :, 1] >> 4 << 2 | q[:, :, 2] >> 4 << 4 | q[:, :, 3] >> 4 << 6
    return torch.cat([low.flatten(1), high.flatten(1), small.view(torch.uint8), _half(d)], 1)


def _from_q6_k(stored: Tensor) -> Tensor:
    low, high = stored[:, :128].view(-1, 2, 2, 32), stored[:, 128:192].view(-1, 2, 32)
    fours = torch.cat([low & 15, low >> 4], 2)
    twos = torch.stack([high >> shift & 3 for shift in (0, 2, 4, 6)], 2)
    q = (fours | twos << 4).view(-1, 16, 16).float() - 32
    small = stored[:, 192:208].contiguous().view(torch.int8)
    return ((_number(stored[:, 208:]) * small)[..., None] * q).flatten(1)


FORMS = {
    "Q8_0": Form(32, 34, _q8_0, _from_q8_0),
    "Q4_0": Form(32, 18, _q4_0, _from_q4_0),
    "Q5_0": Form(32, 22, _q5_0, _from_q5_0),
    "Q4_K": Form(256, 144, _q4_k, _from_q4_k),
    "Q6_K": Form(256, 210, _q6_k, _from_q6_k),
}

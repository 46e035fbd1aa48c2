"""Weights of -1, 0 and 1 with one scale, multiplied by inputs of 8 bits: codes, five of them in a byte, and the gradient.

Source: Zhu et al. 2024, arXiv:2406.02528, section 3.1 and algorithm 1, as the authors' code has them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, pad

from modelwright.maths.rounding import rounded_rows

LEAST = 1e-5  # of a scale
EPSILON = 1e-6  # of the norm
DIGITS = 5  # of base 3 in a byte: 3^5 = 243


def ternary(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Codes -1, 0 and 1, int8 [out, in], of a weight over its scale mean|w|, float32 [1]; the mean is taken in float32."""
    scale = weight.detach().float().abs().mean().clamp(min=LEAST).view(1)
    return (weight.detach().float() / scale).round_().clamp_(-1, 1).to(torch.int8), scale


def pack(codes: Tensor) -> Tensor:
    """Codes int8 [rows, n] of -1, 0 and 1 → uint8 [rows, ceil(n / 5)]: byte k holds Σ (code 5k + j, plus 1) · 3^j."""
    digits = pad(codes.to(torch.int16) + 1, (0, -codes.shape[1] % DIGITS)).unflatten(-1, (-1, DIGITS))
    return (digits * _powers(codes)).sum(-1).to(torch.uint8)


def unpack(stored: Tensor, columns: int) -> Tensor:
    """The codes that `pack` stored: uint8 [rows, bytes] → int8 [rows, columns]."""
    digits = stored.to(torch.int16).unsqueeze(-1) // _powers(stored) % 3
    return (digits - 1).flatten(-2)[..., :columns].to(torch.int8)


def product(inputs: Tensor, gain: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    """Normed inputs in 8 bits, a scale for each token, times codes [out, in] · scale: float32 [..., out].

    inputs [..., in]; gain [in] of the RMSNorm. Sums are of whole numbers, at most 127 · in, which float32 holds exactly up to 2^24.
    """
    with torch.autocast(inputs.device.type, enabled=False):
        numbers, step = rounded_rows(_normed(inputs.float())[0] * gain.float(), 8)
        return linear(numbers.float(), codes.float()) * (step * scale)


def trained_product(inputs: Tensor, gain: Tensor, weight: Tensor) -> Tensor:
    """`product` with the codes of a weight [out, in], and gradients that pass both roundings straight through.

    Kept for the gradient are the inputs, as they came, and the weight; everything else is made again.
    """
    return _Product.apply(inputs, gain, weight)  # type: ignore[no-any-return, no-untyped-call]


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: Tensor, gain: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(inputs, gain, weight)
        return product(inputs, gain, *ternary(weight))

    @staticmethod
    def backward(ctx: Any, *outward: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        inputs, gain, weight = ctx.saved_tensors
        flat, out = inputs.reshape(-1, inputs.shape[-1]).float(), outward[0].reshape(-1, len(weight)).float()
        normed, inverse = _normed(flat)
        numbers, step = rounded_rows(normed * gain.float(), 8)
        codes, scale = ternary(weight)
        inward = linear(out, codes.T.float()) * scale
        behind = inward * gain.float()
        slope = inverse * (behind - normed * (behind * normed).mean(-1, keepdim=True))
        by_weight = out.T @ (numbers.float() * step)
        return slope.view(inputs.shape).to(inputs.dtype), (inward * normed).sum(0).to(gain.dtype), by_weight.to(weight.dtype)


def _normed(inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Inputs [..., in] over their root mean square, and 1 over that."""
    inverse = (inputs.square().mean(-1, keepdim=True) + EPSILON).rsqrt()
    return inputs * inverse, inverse


def _powers(like: Tensor) -> Tensor:
    return 3 ** torch.arange(DIGITS, dtype=torch.int16, device=like.device)

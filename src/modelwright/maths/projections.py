"""Random maps from few values to many that keep lengths: ‖P z‖ ≈ ‖z‖.

Li, Farkhoor, Liu, Yosinski 2018, arXiv:1804.08838, sections 2 and S7. What is drawn is a function of a generator of the processor's alone.
"""

from __future__ import annotations

import hashlib
from typing import Literal, get_args

import torch
from torch import Tensor

from modelwright.maths.rotations import walsh_hadamard

Form = Literal["dense", "sparse", "fastfood"]


def draw(form: Form, size: int, count: int, random: torch.Generator) -> tuple[Tensor, ...]:
    """What a map from `count` to `size` values is made of.

    dense: P [size, count], normal with columns of length one. sparse: places [count, n] and signs [count, n] of the entries of each
    column, n = √size, one from each of n equal stretches. fastfood: signs B, an order Π and normal numbers G, each [L], the next power of
    two from `size` on.
    """
    if form == "dense":
        matrix = torch.randn(size, count, generator=random)
        return (matrix / matrix.norm(dim=0),)
    if form == "sparse":
        ends = torch.arange(round(size**0.5) + 1) * size // round(size**0.5)
        lengths = ends[1:] - ends[:-1]
        within = (torch.rand(count, len(lengths), generator=random) * lengths).long().clamp(max=lengths - 1)
        return ends[:-1] + within, _signs((count, len(lengths)), random)
    length = padded(size)
    return _signs((length,), random), torch.randperm(length, generator=random), torch.randn(length, generator=random)


def project(form: Form, values: Tensor, size: int, drawn: tuple[Tensor, ...]) -> Tensor:
    """P z [size] for z [count]; gradients of z are Pᵀ g.

    Of fastfood the first `size` of H G Π H B z, z filled up with zeros, at a scale at which its mean square length is ‖z‖.
    """
    if form == "dense":
        return drawn[0].to(values.dtype) @ values
    if form == "sparse":
        places, signs = drawn
        entries = signs * values[:, None] / places.shape[1] ** 0.5
        return values.new_zeros(size).index_add(0, places.flatten(), entries.flatten())
    signs, order, normal = drawn
    long = torch.nn.functional.pad(values, (0, len(signs) - len(values)))
    mixed = walsh_hadamard(normal.to(values.dtype) * walsh_hadamard(signs * long)[order])
    return mixed[:size] * (len(signs) / (size * float(normal.double().square().sum())) ** 0.5)


def padded(size: int) -> int:
    """The next power of two from `size` on."""
    return 1 << (size - 1).bit_length()


def fingerprint(seed: int) -> int:
    """What a generator of this seed draws, as a number that tells it from one that draws otherwise."""
    random = torch.Generator().manual_seed(seed)
    parts = [value for form in get_args(Form) for value in draw(form, 64, 4, random)]
    return int.from_bytes(hashlib.sha256(b"".join(value.numpy().tobytes() for value in parts)).digest()[:7], "big")


def _signs(shape: tuple[int, ...], random: torch.Generator) -> Tensor:
    """±1, int8."""
    return torch.randint(0, 2, shape, generator=random, dtype=torch.int8) * 2 - 1

"""How scales are stored: in a float's own dtype, as powers of two, as floats of 8 bits, or quantised in their turn.

`store` gives the tensors by name; `read` what they stand for, in float32. Codes are chosen with the scales as they are read.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

import torch
from torch import Tensor

from modelwright.maths.levels import Levels, levels
from modelwright.maths.rounding import smallest_scale

FORMS = ("own", "float32", "e8m0", "e4m3", "nested")
LARGEST = 448.0  # of the floats with 4 bits of exponent and 3 of mantissa
NESTED = 256  # scales that share a scale of their own


def store(scale: Tensor, form: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """Store scales [rows, groups], float32 and at least 0, in one of FORMS; dtype is that of `own`.

    own, float32: `weight_scale` in that dtype. e8m0: uint8, 2^(byte - 127), what is no power of two is rounded down. e4m3: floats
    of 8 bits, times `weight_global_scale` [1], which brings the largest to 448 (Nvidia's NVFP4). nested: `weight_scale` uint8, the
    codes of `dynamic_map` times `nested_scale` [n / 256] plus `nested_offset` [1], all over the scales in a row (QLoRA).
    """
    if form == "own" or form == "float32":
        kind = dtype if form == "own" else torch.float32
        return {"weight_scale": scale.to(kind).clamp_(min=smallest_scale(kind))}
    if form == "e8m0":
        exponent = torch.frexp(scale.clamp(min=torch.finfo(torch.float32).tiny)).exponent - 1
        return {"weight_scale": (exponent + 127).clamp_(0, 254).to(torch.uint8)}
    if form == "e4m3":
        largest = scale.max().clamp(min=torch.finfo(torch.float32).tiny)
        whole = (LARGEST / largest).clamp(max=torch.finfo(torch.float32).max).view(1)
        small = (scale * whole).clamp(2.0**-9, LARGEST).to(torch.float8_e4m3fn)  # never 0, so that a scale can be divided by
        return {"weight_scale": small, "weight_global_scale": whole}
    assert form == "nested", form
    offset = scale.mean().view(1)
    rest = torch.nn.functional.pad((scale - offset).flatten(), (0, -scale.numel() % NESTED)).view(-1, NESTED)
    size = rest.abs().amax(1).clamp(min=1e-38)
    codes = dynamic_map().encode(rest / size[:, None]).flatten()[: scale.numel()].view(scale.shape)
    return {"weight_scale": codes, "nested_scale": size, "nested_offset": offset}


def read(stored: Mapping[str, Tensor], form: str) -> Tensor:
    """The scales that stored tensors stand for, float32 [rows, groups]."""
    scale = stored["weight_scale"]
    if form == "e8m0":
        return torch.exp2(scale.float() - 127)
    if form == "e4m3":
        return scale.float() / stored["weight_global_scale"]
    if form == "nested":
        sizes = stored["nested_scale"].repeat_interleave(NESTED)[: scale.numel()].view(scale.shape)
        return dynamic_map().decode(scale) * sizes + stored["nested_offset"]
    return scale.float()


def empty(form: str, rows: int, groups: int, dtype: torch.dtype | None, device: torch.device | str | None) -> dict[str, Tensor]:
    """Tensors like those of `store`, without values."""
    kinds = {"own": dtype, "float32": torch.float32, "e8m0": torch.uint8, "e4m3": torch.float8_e4m3fn, "nested": torch.uint8}
    made = {"weight_scale": torch.empty(rows, groups, dtype=kinds[form], device=device)}
    if form == "e4m3":
        made["weight_global_scale"] = torch.empty(1, dtype=torch.float32, device=device)
    if form == "nested":
        made["nested_scale"] = torch.empty(-(-rows * groups // NESTED), dtype=torch.float32, device=device)
        made["nested_offset"] = torch.empty(1, dtype=torch.float32, device=device)
    return made


@functools.cache
def dynamic_map() -> Levels:
    """The 256 levels of bitsandbytes' signed dynamic 8-bit numbers: 7 decades of which each has twice the levels of the last.

    Source: Dettmers et al. 2022, arXiv:2110.02861, section 1.3, as bitsandbytes makes them. The codes are the levels' places.
    """
    found = [0.0, 1.0]
    for decade in range(7):
        ends = torch.linspace(0.1, 1, 2**decade + 1)  # in float32, so that they are those of bitsandbytes to the bit
        means = 10.0 ** (decade - 6) * ((ends[1:] + ends[:-1]) / 2)
        found += [*means.tolist(), *(-means).tolist()]
    return levels(torch.tensor(sorted(found)))

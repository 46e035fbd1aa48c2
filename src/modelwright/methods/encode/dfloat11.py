"""Code the exponents of weights, which take few values, and leave every bit of every weight as it was.

Zhang et al. 2025, arXiv:2504.11651 (DFloat11), section 3. Layout and decoder are in `maths.prefix_codes` and `maths.coded_floats`.
Differs: codes are at most 12 bits long, so that one table decodes them; symbols stand in lanes, which need no second pass; each matrix
has a code of its own, where the authors give one to a block; float32 and float16 are taken too, by their own split.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from modelwright.blocks.coded import CodedLinear
from modelwright.core.method import TensorMethod
from modelwright.maths.coded_floats import SPLITS, least_bytes
from modelwright.maths.prefix_codes import planned_bytes
from modelwright.methods.encode._mechanism import NUMBA, Tally

TYPICAL = 2.65  # bits of a coded exponent, of weights with a normal distribution


@dataclass(frozen=True, kw_only=True)
class Dfloat11(TensorMethod):
    """Store weights in about two thirds of bfloat16's bytes, and compute the same bits; each matrix is decoded when it is used."""

    status: ClassVar[str] = "checked"
    sites: ClassVar[tuple[str, ...]] = ("attn", "mlp", "experts", "linear", "embed", "head")
    leaves: ClassVar[frozenset[str]] = frozenset({"packed"})
    drops: ClassVar[frozenset[str]] = frozenset({"float"})
    loads: ClassVar[Mapping[str, int]] = {"numba": NUMBA}
    whole: ClassVar[bool] = True
    neutral = dict()
    fails = {"neutral_settings_change_no_output [qwen3_moe]": "experts with matrices of their own are summed in another order than a stack"}

    def tensor(self, weight: Tensor, notes: list[str]) -> Tensor | nn.Module:
        if self.planned(weight) is weight:
            what = f"of {str(weight.dtype).removeprefix('torch.')} and shape {list(weight.shape)}"
            notes.append(f"{self.name()} left a tensor {what} as it is; it codes matrices of bfloat16, float16 and float32")
            return weight
        layer = CodedLinear.from_dense(weight)
        Tally.add(notes, self.name(), weight.numel(), layer.stored_bytes(), least_bytes(weight))
        return layer

    def planned(self, weight: Tensor) -> Tensor | nn.Module:
        if weight.dtype not in SPLITS or weight.ndim != 2:
            return weight
        return CodedLinear.empty(weight, planned_bytes(weight.numel(), TYPICAL))

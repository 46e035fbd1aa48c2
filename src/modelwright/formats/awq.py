"""The layout of AWQ checkpoints, version gemm: 4-bit codes of the transposed weight, eight outputs to a word in an order of its own.

Source: casper-hansen/AutoAWQ.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from modelwright.blocks.packed import PackedLinear
from modelwright.core.model import Model
from modelwright.formats._layout import Folder, Unfit
from modelwright.formats.gptq import Integers, group_size, unfit_integers, zeros_of
from modelwright.maths import rounding

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # the output in each four bits of a word, from the lowest
BACK = (0, 4, 1, 5, 2, 6, 3, 7)  # and where each output is


def pack(codes: Tensor) -> Tensor:
    """Signed codes int8 [rows, columns] of 4 bits as int32 [rows, columns / 8]."""
    return rounding.pack(codes.unflatten(1, (-1, 8))[..., list(ORDER)].flatten(1), 4)


def unpack(packed: Tensor) -> Tensor:
    """The signed codes int8 [rows, columns] of `pack`."""
    return rounding.unpack(packed, 4, 8 * packed.shape[1]).unflatten(1, (-1, 8))[..., list(BACK)].flatten(1)


class Awq(Integers):
    """AWQ's."""

    name = "AWQ"
    heads = False

    def unfit(self, layer: nn.Module) -> str:
        if why := unfit_integers(layer, self.name, (4,)):
            return why
        assert isinstance(layer, PackedLinear)
        return f"has {layer.out_features} outputs, which are no multiple of 8" if layer.out_features % 8 else ""

    def same(self, layer: PackedLinear, rows: bool) -> tuple[Any, ...]:
        return (f"group {group_size(layer, rows)}",)

    def tensors(self, layer: PackedLinear) -> dict[str, Tensor]:
        scales = layer.weight_scale.t().to(torch.float16)
        return {"qweight": pack(layer.codes().t()), "qzeros": pack(zeros_of(layer).t()), "scales": scales}

    def config(self, layer: PackedLinear, rows: bool, plain: list[str], head: str) -> dict[str, Any]:
        left = [name for name in plain if name != head] or None
        return {"quant_method": "awq", "bits": 4, "group_size": group_size(layer, rows), "zero_point": True, "version": "gemm",
                "modules_to_not_convert": left}  # fmt: skip

    def refused(self, config: Mapping[str, Any]) -> str:
        version, bits = str(config.get("version", "gemm")).lower(), config.get("bits", 4)
        return f"in its version {version} with bits {bits}" if version != "gemm" or bits != 4 else ""

    def layer(self, stored: Mapping[str, Tensor], config: Mapping[str, Any], dtype: torch.dtype) -> PackedLinear:
        codes, scale = unpack(stored["qweight"]).t().contiguous(), stored["scales"].t().contiguous()
        if codes.shape[1] % scale.shape[1]:
            raise Unfit(f"its {codes.shape[1]} inputs are no whole groups of {config.get('group_size')}")
        zero = unpack(stored["qzeros"]).t().contiguous()
        return PackedLinear.from_codes(codes, scale.to(dtype), zero if zero.any() else None, 4)


LAYOUT = Awq()


def writer(model: Model) -> Folder:
    """The folder of a model in this layout."""
    return Folder(model, LAYOUT)

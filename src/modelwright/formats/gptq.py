"""The layout of GPTQ checkpoints: transposed codes in 32-bit words, with a scale and a zero point for each group of inputs.

Source: ModelCloud/GPTQModel and AutoGPTQ before it. `checkpoint_format` gptq, version 1, stores zero points less one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from modelwright.blocks.packed import PackedLinear
from modelwright.core.model import Model
from modelwright.formats._layout import Folder, Layout, Unfit
from modelwright.maths import rounding

BITS = (2, 3, 4, 8)


def pack(codes: Tensor, zero: Tensor, bits: int, version: int = 1) -> tuple[Tensor, Tensor]:
    """Signed codes int8 [out, in] and zero points int8 [out, groups] as qweight and qzeros.

    They are int32 [in · bits / 32, out] and [groups, out · bits / 32], so in · bits and out · bits are multiples of 32. In version 1
    the unsigned zero point 0 becomes 2^bits - 1.
    """
    half = 1 << (bits - 1)
    stored = ((zero.to(torch.int16) + half - int(version == 1)) % (2 * half) - half).to(torch.int8)
    return rounding.pack(codes, bits).t().contiguous(), rounding.pack(stored.t().contiguous(), bits)


def unpack(qweight: Tensor, qzeros: Tensor, bits: int, version: int = 1) -> tuple[Tensor, Tensor]:
    """The signed codes int8 [out, in] and zero points int8 [out, groups] of `pack`."""
    codes = rounding.unpack(qweight.t().contiguous(), bits, len(qweight) * 32 // bits)
    stored = rounding.unpack(qzeros, bits, qweight.shape[1]).to(torch.int16).t()
    half = 1 << (bits - 1)
    return codes, ((stored + half + int(version == 1)) % (2 * half) - half).to(torch.int8)


def unfit_integers(layer: nn.Module, name: str, bits: tuple[int, ...]) -> str:
    """Why a layer is none of whole numbers with float16 scales for weights alone, as the end of a sentence; "" if it is."""
    if not isinstance(layer, PackedLinear):
        return f"is a {type(layer).__name__}, and {name} is for whole numbers"
    if layer.bits not in bits:
        return f"has bits {layer.bits}, and there are {', '.join(map(str, bits))}"
    if layer.zeros == "float":
        return "has float zero points, and there are whole ones alone"
    if layer.inputs:
        return f"rounds its inputs to {layer.inputs} bits, and there weights alone are rounded"
    small = layer.weight_scale.to(torch.float16)
    if not (small.isfinite() & (small > 0)).all():
        return "has scales that float16 cannot hold"
    return ""


def zeros_of(layer: PackedLinear) -> Tensor:
    """The zero points int8 [out, groups], also of a symmetric layer."""
    zero = layer.zero()
    return torch.zeros_like(layer.weight_scale, dtype=torch.int8) if zero is None else zero


def group_size(layer: PackedLinear, rows: bool) -> int:
    """How many inputs share a scale; -1 where they are whole rows in all layers."""
    return -1 if rows else layer.group or layer.in_features


class Integers(Layout):
    """Layouts of whole numbers with float16 scales."""

    markers = (".qweight",)

    def dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Float16 for bfloat16, which cannot hold the scales."""
        return torch.float16 if dtype == torch.bfloat16 else dtype


class Gptq(Integers):
    """GPTQ's, in version 1 or 2."""

    name = "GPTQ"

    def __init__(self, version: int = 1):
        self.version = version

    def unfit(self, layer: nn.Module) -> str:
        if why := unfit_integers(layer, self.name, BITS):
            return why
        assert isinstance(layer, PackedLinear)
        for count, what in ((layer.in_features, "inputs"), (layer.out_features, "outputs")):
            if count * layer.bits % 32:
                return f"has {count} {what} of {layer.bits} bits, which fill no whole words of 32 bits"
        if self.version == 1 and int(zeros_of(layer).min()) == -(1 << (layer.bits - 1)):
            return "has zero points at the lowest code, which readers of version 1 read in two ways; write gptq_v2"
        return ""

    def same(self, layer: PackedLinear, rows: bool) -> tuple[Any, ...]:
        return f"bits {layer.bits}", f"group {group_size(layer, rows)}", f"symmetric {layer.weight_zero_point is None}"

    def tensors(self, layer: PackedLinear) -> dict[str, Tensor]:
        weight, zeros = pack(layer.codes(), zeros_of(layer), layer.bits, self.version)
        place = torch.arange(layer.in_features, dtype=torch.int32) // (layer.group or layer.in_features)
        return {"qweight": weight, "qzeros": zeros, "scales": layer.weight_scale.t().to(torch.float16), "g_idx": place}

    def config(self, layer: PackedLinear, rows: bool, plain: list[str], head: str) -> dict[str, Any]:
        inside = [name for name in plain if name != head]
        return {
            "quant_method": "gptq",
            "bits": layer.bits,
            "group_size": group_size(layer, rows),
            "desc_act": False,
            "sym": layer.weight_zero_point is None,
            "lm_head": head not in plain,
            "checkpoint_format": "gptq" if self.version == 1 else "gptq_v2",
            "pack_dtype": "int32",
        } | ({"dynamic": {f"-:^{re.escape(name)}$": {} for name in inside}} if inside else {})

    def refused(self, config: Mapping[str, Any]) -> str:
        form, bits = config.get("checkpoint_format") or "gptq", config.get("bits")
        if form not in ("gptq", "gptq_v2"):
            return f"in its form {form}"
        if bits not in BITS:
            return f"with bits {bits}"
        if any(not str(pattern).startswith("-") for pattern in config.get("dynamic") or {}):
            return "with settings of their own for some layers (dynamic)"
        return ""

    def layer(self, stored: Mapping[str, Tensor], config: Mapping[str, Any], dtype: torch.dtype) -> PackedLinear:
        version = 2 if config.get("checkpoint_format") == "gptq_v2" else 1
        codes, zero = unpack(stored["qweight"], stored["qzeros"], config["bits"], version)
        scale = stored["scales"].t().contiguous()
        columns, groups = codes.shape[1], scale.shape[1]
        if columns % groups:
            raise Unfit(f"its {columns} inputs are no whole groups of {config.get('group_size')}")
        if "g_idx" in stored and not torch.equal(stored["g_idx"].long(), torch.arange(columns) // (columns // groups)):
            raise Unfit("its inputs belong to groups in an order of their own (desc_act)")
        return PackedLinear.from_codes(codes, scale.to(dtype), zero if zero.any() else None, config["bits"])


LAYOUT = Gptq()


def writer(model: Model, version: int = 1) -> Folder:
    """The folder of a model in this layout."""
    return Folder(model, Gptq(version))

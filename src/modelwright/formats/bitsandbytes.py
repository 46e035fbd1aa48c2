"""The layouts of bitsandbytes: NF4, with or without scales that are quantised in their turn, and LLM.int8().

Source: bitsandbytes 0.50, `functional.py` and `nn/modules.py`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from modelwright.blocks._stored import Stored
from modelwright.blocks.levels import LevelsLinear
from modelwright.blocks.packed import PackedLinear
from modelwright.core.model import Model
from modelwright.formats._layout import Folder, Layout, Unfit
from modelwright.maths.grids import Scaled
from modelwright.maths.levels import named
from modelwright.maths.scales import NESTED, dynamic_map

STATE = "weight.quant_state.bitsandbytes__nf4"
GROUPS = tuple(1 << power for power in range(5, 13))  # 32 to 4096, those that there are kernels for


def pack(codes: Tensor) -> Tensor:
    """Codes uint8 [out, in] below 16 as uint8 [out · in / 2, 1]: of two neighbours the first in the high four bits."""
    pairs = codes.reshape(-1, 2)
    return (pairs[:, :1] << 4) | pairs[:, 1:]


def unpack(packed: Tensor, rows: int) -> Tensor:
    """The codes uint8 [rows, in] of `pack`."""
    return torch.cat([packed.view(-1, 1) >> 4, packed.view(-1, 1) & 15], 1).view(rows, -1)


class Bitsandbytes(Layout):
    """bitsandbytes'."""

    name = "bitsandbytes"
    markers = (f".{STATE}", ".SCB")

    def unfit(self, layer: nn.Module) -> str:
        if isinstance(layer, LevelsLinear) and layer.levels == "nf4":
            group = layer.group or layer.in_features
            if layer.scales not in ("float32", "nested"):
                return f"has scales of the form {layer.scales}, and there are float32 and nested"
            return "" if group in GROUPS else f"has groups of {group} weights, and there are {', '.join(map(str, GROUPS))}"
        if isinstance(layer, PackedLinear) and layer.bits == 8:
            if layer.group or layer.weight_zero_point is not None:
                return "has groups or zero points, and there is one scale for each row. Use quantize.llm_int8"
            return "" if layer.inputs == 8 else "rounds no inputs to 8 bits, as there all do. Use quantize.llm_int8"
        what = f"{layer.levels} levels" if isinstance(layer, LevelsLinear) else f"a {type(layer).__name__}"
        return f"has {what}, and there are NF4 and whole numbers of 8 bits. Use quantize.nf4 or quantize.llm_int8"

    def same(self, layer: Any, rows: bool) -> tuple[Any, ...]:
        if isinstance(layer, LevelsLinear):  # each layer has its group beside it
            return "nf4", f"nested {layer.scales == 'nested'}"
        return "bits 8", f"threshold {layer.threshold}"

    def tensors(self, layer: Any) -> dict[str, Tensor]:
        if isinstance(layer, PackedLinear):
            form = torch.tensor(0, dtype=torch.uint8)
            return {"weight": layer.codes(), "SCB": layer.weight_scale[:, 0].float() * 127, "weight_format": form}
        state = {"quant_type": "nf4", "blocksize": layer.group or layer.in_features, "dtype": str(layer.dtype).removeprefix("torch."),
                 "shape": [layer.out_features, layer.in_features]}  # fmt: skip
        found = {"weight": pack(layer.codes()), "weight.absmax": layer.weight_scale.flatten(), "weight.quant_map": layer.values().clone()}
        if layer.scales == "nested":
            found |= {"weight.nested_absmax": layer.nested_scale, "weight.nested_quant_map": dynamic_map().values.clone()}
            state |= {"nested_blocksize": NESTED, "nested_dtype": "float32", "nested_offset": layer.nested_offset.item()}
        return found | {STATE: torch.frombuffer(bytearray(json.dumps(state).encode()), dtype=torch.uint8)}

    def config(self, layer: Any, rows: bool, plain: list[str], head: str) -> dict[str, Any]:
        eight = isinstance(layer, PackedLinear)
        stated = {"quant_method": "bitsandbytes", "load_in_4bit": not eight, "load_in_8bit": eight, "llm_int8_skip_modules": plain}
        if eight:
            return stated | {"llm_int8_threshold": layer.threshold}
        return stated | {
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": layer.scales == "nested",
            "bnb_4bit_compute_dtype": str(layer.dtype).removeprefix("torch."),
            "bnb_4bit_quant_storage": "uint8",
        }

    def refused(self, config: Mapping[str, Any]) -> str:
        if config.get("load_in_8bit"):
            return ""
        kind, held = config.get("bnb_4bit_quant_type", "fp4"), config.get("bnb_4bit_quant_storage", "uint8")
        return "" if (kind, held) == ("nf4", "uint8") else f"with {kind} in {held}"

    def layer(self, stored: Mapping[str, Tensor], config: Mapping[str, Any], dtype: torch.dtype) -> Stored:
        if "SCB" in stored:
            scale = (stored["SCB"] / 127).to(dtype).clamp_(min=torch.finfo(dtype).tiny)[:, None]
            return PackedLinear.from_codes(stored["weight"], scale, None, 8, inputs=8, threshold=config.get("llm_int8_threshold", 6.0))
        state = json.loads(bytes(stored[STATE].tolist()))
        (rows, columns), group, table = state["shape"], state["blocksize"], named("nf4")
        if columns % group:
            raise Unfit(f"its blocks of {group} run over the ends of rows of {columns}")
        nested = "nested_offset" in state
        if not torch.equal(stored["weight.quant_map"], table.values):
            raise Unfit("its levels are none of NF4")
        scales = {"weight_scale": stored["weight.absmax"].view(rows, -1)}
        if nested:
            if state["nested_blocksize"] != NESTED or not torch.equal(stored["weight.nested_quant_map"], dynamic_map().values):
                raise Unfit(f"its scales are quantised otherwise than in blocks of {NESTED} by the dynamic map")
            offset = torch.tensor([state["nested_offset"]], dtype=torch.float32)
            scales |= {"nested_scale": stored["weight.nested_absmax"], "nested_offset": offset}
        grid = Scaled(table, scales, "nested" if nested else "float32")
        return LevelsLinear.from_codes(unpack(stored["weight"], rows), grid, "nf4", dtype)


LAYOUT = Bitsandbytes()


def writer(model: Model) -> Folder:
    """The folder of a model in this layout."""
    return Folder(model, LAYOUT)

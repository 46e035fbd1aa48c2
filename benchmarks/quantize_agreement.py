"""The quantisers against torchao's, hqq's and bitsandbytes' on the same weights: scales, zero points, codes and errors.

python benchmarks/quantize_agreement.py --peer-python PATH    # PATH: a Python with torchao, hqq and bitsandbytes; by default this one

Weights are drawn from a seed: normal ones, a fiftieth of which are five times as large. What both store is compared, and how far
the weights that their codes stand for are from the given ones.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import _run

ROWS, COLUMNS = 256, 1024
RUN = 256  # weights of each of the runs that HQQ is given one by one


@dataclass
class Case:
    """One way to store a weight, said twice."""

    method: str
    settings: dict[str, Any]
    peer: str  # a function of this file
    arguments: dict[str, Any] = field(default_factory=dict)
    dtype: str = "float32"
    alone: bool = False  # each group is a weight of its own


GROUPS = {"bits": 4, "group": 128}
CASES = {
    "integers, 4 bits": Case("rtn", GROUPS, "torchao_integers", GROUPS),
    "integers, 4 bits, zero points": Case("rtn", {**GROUPS, "symmetric": False}, "torchao_integers", {**GROUPS, "symmetric": False}),
    "integers, 8 bits": Case("rtn", {"bits": 8, "group": 128}, "torchao_integers", {"bits": 8, "group": 128}),
    "integers, 8 bits, zero points": Case(
        "rtn", {"bits": 8, "group": 128, "symmetric": False}, "torchao_integers", {"bits": 8, "group": 128, "symmetric": False}
    ),
    "integers, 8 bits by row": Case("rtn", {"bits": 8, "group": 0}, "torchao_int8"),
    "integers, 4 bits, bfloat16": Case("rtn", GROUPS, "torchao_integers", GROUPS, "bfloat16"),
    "integers, 4 bits, float zero points": Case("rtn", {**GROUPS, "symmetric": False}, "torchao_int4", {"group": 128}),
    "HQQ, 4 bits": Case("hqq", {"bits": 4}, "hqq", {"bits": 4}),
    "HQQ, 8 bits": Case("hqq", {"bits": 8}, "hqq", {"bits": 8}),
    "HQQ, 3 bits": Case("hqq", {"bits": 3}, "hqq", {"bits": 3}),
    "HQQ, 2 bits": Case("hqq", {"bits": 2}, "hqq", {"bits": 2}),
    "HQQ, 4 bits, groups alone": Case("hqq", {"bits": 4}, "hqq", {"bits": 4, "keep": True}, alone=True),
    "HQQ, 2 bits, groups alone": Case("hqq", {"bits": 2}, "hqq", {"bits": 2, "keep": True}, alone=True),
    "HQQ of torchao, 4 bits": Case("hqq", {"bits": 4}, "torchao_hqq", {"bits": 4}),
    "NF4": Case("nf4", {"nested": False}, "bitsandbytes_nf4"),
    "NF4, nested": Case("nf4", {}, "bitsandbytes_nf4", {"nested": True}),
    "NF4, bfloat16": Case("nf4", {"nested": False}, "bitsandbytes_nf4", {}, "bfloat16"),
    "LLM.int8()": Case("llm_int8", {}, "bitsandbytes_int8", {}, "float16"),
}


def weight_of(case: Case) -> Any:
    """The weight [rows, columns] of a case."""
    import torch

    rng = torch.Generator().manual_seed(0)
    weight = torch.randn(ROWS, COLUMNS, generator=rng) * 0.02
    weight *= 1 + 4 * (torch.rand(ROWS, COLUMNS, generator=rng) < 0.02)
    return weight.to(getattr(torch, case.dtype))


def parts_of(case: Case) -> list[Any]:
    """The weights that a case stores: the whole, or runs of one group each."""
    weight = weight_of(case)
    return list(weight.view(-1, 1, 64)[:RUN]) if case.alone else [weight]


def put(work: str, who: str, name: str, found: list[dict[str, Any]]) -> None:
    """Write what was stored of a case: codes, scales [rows, groups], zero points or none, and the weights that they stand for."""
    import torch

    joined = {key: torch.cat([one[key].detach().clone() for one in found]) for key in found[0] if found[0][key] is not None}
    torch.save(joined, Path(work) / f"{who}-{list(CASES).index(name)}.pt")


def ours(work: str, names: list[str]) -> None:
    """Store all weights with Modelwright."""
    from modelwright.core.find import find

    for name in names:
        case = CASES[name]
        method = find(f"quantize.{case.method}").build(case.settings)
        layers = [method.tensor(weight) for weight in parts_of(case)]
        zeros = hasattr(layers[0], "zero")
        put(work, "ours", name, [
            {"codes": layer.codes(), "scale": layer.weight_scale if zeros else layer.scale(), "zero": layer.zero() if zeros else None,
             "dense": layer.dense()} for layer in layers
        ])  # fmt: skip


def theirs(work: str, names: list[str]) -> None:
    """Store all weights with the peers."""
    for name in names:
        case = CASES[name]
        store: Callable[..., dict[str, Any]] = globals()[case.peer]
        put(work, "theirs", name, [store(weight, **case.arguments) for weight in parts_of(case)])


def torchao_integers(weight: Any, bits: int, group: int, symmetric: bool = True) -> dict[str, Any]:
    """IntxWeightOnlyConfig, as `quantize_` applies it to a linear layer."""
    import torch
    from torchao.quantization import IntxWeightOnlyConfig, PerGroup, quantize_
    from torchao.quantization.quant_primitives import MappingType

    kind = MappingType.SYMMETRIC if symmetric else MappingType.ASYMMETRIC
    config = IntxWeightOnlyConfig(weight_dtype=getattr(torch, f"int{bits}"), granularity=PerGroup(group), mapping_type=kind)
    return _torchao(weight, lambda layer: quantize_(layer, config), zeros=not symmetric)


def torchao_int8(weight: Any) -> dict[str, Any]:
    """Int8WeightOnlyConfig at its defaults."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    return _torchao(weight, lambda layer: quantize_(layer, Int8WeightOnlyConfig(version=2)), zeros=False)


def _torchao(weight: Any, apply: Callable[[Any], Any], zeros: bool) -> dict[str, Any]:
    import torch

    layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
    layer.weight.data.copy_(weight)
    apply(layer)
    held = layer.weight
    return {"codes": held.qdata, "scale": held.scale.view(len(weight), -1),
            "zero": held.zero_point.view(len(weight), -1) if zeros else None, "dense": held.dequantize()}  # fmt: skip


def torchao_int4(weight: Any, group: int) -> dict[str, Any]:
    """The grid of Int4WeightOnlyConfig, by its primitives: its layers are for accelerators. Zero points are floats, 0 need be no point."""
    import torch
    from torchao.quantization import quant_primitives as found
    from torchao.quantization.quant_primitives import MappingType

    kinds = {"quant_min": 0, "quant_max": 15}
    scale, zero = found._choose_qparams_affine_tinygemm(weight, MappingType.ASYMMETRIC, (1, group), torch.int32, **kinds)
    codes = found._quantize_affine_tinygemm(weight, (1, group), scale, zero, torch.int32, **kinds)
    dense = found._dequantize_affine_tinygemm(codes, (1, group), scale, zero, torch.int32, **kinds, output_dtype=weight.dtype)
    return {"codes": codes - 8, "scale": scale, "zero": -zero / scale, "dense": dense}  # w = (code - 8) · scale + zero


def torchao_hqq(weight: Any, bits: int) -> dict[str, Any]:
    """The copy of HQQ in torchao, which its int4 layers offer."""
    import torch
    from torchao.quantization.quant_primitives import _choose_qparams_and_quantize_affine_hqq

    codes, scale, zero, _ = _choose_qparams_and_quantize_affine_hqq(
        weight, bits, 64, compute_dtype=torch.float32, device="cpu", raw_output=True
    )
    return _of_hqq(codes, scale, zero, bits, weight)


def hqq(weight: Any, bits: int, keep: bool = False) -> dict[str, Any]:
    """hqq's solver at the defaults of its layers; keep: that of its files which goes back to the best step, once for the whole weight."""
    from hqq.core.optimize import optimize_weights_proximal_legacy, optimize_weights_proximal_v2
    from hqq.core.quantize import Quantizer

    Quantizer.optimize_weights = optimize_weights_proximal_v2 if keep else optimize_weights_proximal_legacy
    codes, found = Quantizer.quantize(weight, bits, True, 64, True, bits == 4, axis=1, bitpack=False, device="cpu")
    return _of_hqq(codes, found["scale"], found["zero"], bits, weight)


def _of_hqq(codes: Any, scale: Any, zero: Any, bits: int, weight: Any) -> dict[str, Any]:
    rows, half = len(weight), 2 ** (bits - 1)
    codes, scale, zero = (values.reshape(rows, -1).float() for values in (codes, scale, zero))
    dense = (codes.view(*scale.shape, -1) - zero[..., None]) * scale[..., None]
    return {"codes": codes - half, "scale": scale, "zero": zero - half, "dense": dense.view(weight.shape)}


def bitsandbytes_nf4(weight: Any, nested: bool = False) -> dict[str, Any]:
    """quantize_4bit with the levels of NF4, in blocks of 64."""
    import torch
    from bitsandbytes import functional

    packed, state = functional.quantize_4bit(weight, blocksize=64, compress_statistics=nested, quant_type="nf4")
    codes = torch.stack([packed.view(-1) >> 4, packed.view(-1) & 15], 1).view(weight.shape)
    scale = functional.dequantize_blockwise(state.absmax, state.state2) + state.offset if nested else state.absmax
    return {"codes": codes, "scale": scale.view(len(weight), -1), "zero": None, "dense": functional.dequantize_4bit(packed, state)}


def bitsandbytes_int8(weight: Any) -> dict[str, Any]:
    """The rows of LLM.int8()."""
    from bitsandbytes import functional

    codes, largest, _ = functional.int8_vectorwise_quant(weight)
    scale = largest.float()[:, None] / 127
    return {"codes": codes, "scale": scale, "zero": None, "dense": codes.float() * scale}


def share(gaps: Any, rounding: float) -> float:
    """Of gaps, how many are more than rounding."""
    return float((gaps > rounding).double().mean())


def compare(work: str, names: list[str]) -> list[dict[str, Any]]:
    """A row for every case: how far scales (over themselves), zero points and weights (in steps) lie apart at most, what share of scales,
    zero points and codes differ, and the errors of both: root mean square, and mean size, over the weights' own."""
    import torch

    rows = []
    for name in names:
        case = CASES[name]
        weight = torch.cat(parts_of(case)).double()
        mine, other = (
            {key: value.double() for key, value in torch.load(Path(work) / f"{who}-{list(CASES).index(name)}.pt").items()}
            for who in ("ours", "theirs")
        )
        scale, groups = mine["scale"], mine["scale"].shape[1]
        step = scale.repeat_interleave(weight.shape[1] // groups, 1)
        gap = {key: (mine[key] - other[key]).abs() for key in mine}
        wrong = [found["dense"] - weight for found in (mine, other)]
        squares, sizes = ([float(of(one) / of(weight)) for one in wrong] for of in (torch.norm, lambda values: values.abs().sum()))
        row: dict[str, Any] = {"what": name, "peer": case.peer.partition("_")[0]}
        for key, apart, rounding in (("scales", gap["scale"] / scale, 1e-6), ("zeros", gap.get("zero"), 1e-4)):
            row[f"{key} apart"] = None if apart is None else float(apart.max())
            row[f"{key} differ"] = None if apart is None else share(apart, rounding)
        rows.append({
            **row, "codes differ": share(gap["codes"], 0), "weights apart": float((gap["dense"] / step).max()),
            "error": squares[0], "their error": squares[1], "mean": sizes[0], "their mean": sizes[1],
        })  # fmt: skip
        print(json.dumps(rows[-1]), file=sys.stderr)
    return rows


def main() -> None:
    """Store the weights with all, print and save the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", default=sys.executable, help="a Python with torchao, hqq and bitsandbytes")
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--name", default="quantize-agreement", help="the result is docs/results/NAME.json")
    asked = parser.parse_args()
    work = tempfile.mkdtemp(prefix="agreement-")
    try:
        _run.subject("quantize_agreement:ours", work=work, names=asked.cases)
        _run.subject("quantize_agreement:theirs", python=asked.peer_python, work=work, names=asked.cases)
        rows = _run.subject("quantize_agreement:compare", work=work, names=asked.cases).returned
    finally:
        shutil.rmtree(work)
    _run.save(
        asked.name, "Weights stored by Modelwright and by torchao, hqq and bitsandbytes",
        "python benchmarks/quantize_agreement.py --peer-python PATH", rows, peer=asked.peer_python,
    )  # fmt: skip


if __name__ == "__main__":
    main()

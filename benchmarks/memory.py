"""Peak resident memory of streaming work: it does not grow with the checkpoint.

    python benchmarks/memory.py                         # 1 GB and 4 GB checkpoints, and a Llama of 1B parameters
    python benchmarks/memory.py --gigabytes 0.05 0.1 --blocks 2     # a dry run

Block by block, gptq is held against imports + two blocks + the activations of the calibration tokens; what its solver
needs for the widest matrix (second moments and their factors, float32) is given beside it.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path
from typing import Any

import _run

LIMIT = 700  # megabytes
TOKENS = (8, 256)
BILLION = dict(hidden_size=2048, intermediate_size=5632, num_attention_heads=32, num_key_value_heads=4, vocab_size=64000)


def imports() -> None:
    """What any streaming run has loaded before it reads a weight."""
    from transformers import LlamaConfig

    from modelwright.core import stream  # noqa: F401
    from modelwright.core.model import empty_module

    empty_module(LlamaConfig(hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=64))


def stream(method: str, work: str, save: str) -> None:
    """Apply a method from folder to folder."""
    import torch

    import modelwright as mw
    from modelwright.methods.merge.ties import Ties
    from modelwright.methods.prune.magnitude import Magnitude
    from modelwright.methods.quantize.gptq import Gptq
    from modelwright.methods.quantize.rtn import Rtn

    step = {"quantize.rtn": Rtn(), "prune.magnitude": Magnitude(), "merge.ties": Ties(), "quantize.gptq": Gptq()}[method]
    given: dict[str, Any] = {}
    if method == "merge.ties":
        given["donors"] = [f"{work}/first", f"{work}/second"]
    if method == "quantize.gptq":
        ids = torch.randint(BILLION["vocab_size"], TOKENS, generator=torch.Generator().manual_seed(1))
        given["data"] = [{"input_ids": row} for row in ids.split(1)]
    mw.apply(f"{work}/base", step, save=save, **given)


def streamed(sizes: list[float], work: Path, floor: int) -> list[dict[str, Any]]:
    """A row for each tensor-level method and size."""
    rows = []
    for gigabytes in sizes:
        config = _run.subject("_models:config_of", gigabytes=gigabytes).returned
        for seed, name in enumerate(("base", "first", "second")):
            base = str(work / "base") if seed else None
            nbytes = _run.subject("_models:random_llama", folder=str(work / name), config=config, seed=seed, base=base).returned
        for method in ("quantize.rtn", "prune.magnitude", "merge.ties"):
            one = _run.subject("memory:stream", method=method, work=str(work), save=str(work / "out"))
            shutil.rmtree(work / "out")
            rows.append({
                "method": method, "checkpoint MB": _run.megabytes(nbytes), "peak MB": _run.megabytes(one.peak),
                "without imports MB": _run.megabytes(one.peak - floor), "limit MB": LIMIT,
                "peak / checkpoint": one.peak / nbytes, "seconds": one.seconds,
            })  # fmt: skip
            print(_run.table(rows[-1:]))
        for name in ("base", "first", "second"):
            shutil.rmtree(work / name)
    return rows


def blockwise(blocks: int, work: Path, floor: int) -> dict[str, Any]:
    """A row for gptq on a model that is read block by block."""
    width, inner = BILLION["hidden_size"], BILLION["intermediate_size"]
    nbytes = _run.subject("_models:random_llama", folder=str(work / "base"), config=BILLION | {"num_hidden_layers": blocks}).returned
    outside = 2 * 2 * BILLION["vocab_size"] * width
    block = (nbytes - outside) // blocks
    one = _run.subject("memory:stream", method="quantize.gptq", work=str(work), save=str(work / "out"))
    for name in ("base", "out"):
        shutil.rmtree(work / name)
    activations = TOKENS[0] * TOKENS[1] * width * 2 * 2  # what enters a block and what leaves it
    formula = floor + 2 * block + activations
    moments = 4 * (2 * width**2 + inner**2)  # of one block's inputs
    return {
        "method": "quantize.gptq", "checkpoint MB": _run.megabytes(nbytes), "peak MB": _run.megabytes(one.peak),
        "without imports MB": _run.megabytes(one.peak - floor), "limit MB": _run.megabytes(formula),
        "peak / checkpoint": one.peak / nbytes, "seconds": one.seconds, "moments MB": _run.megabytes(moments),
        "outside the blocks MB": _run.megabytes(outside),
    }  # fmt: skip


def main() -> None:
    """Make the models, run the methods, print and save the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, nargs="*", default=[1.0, 4.0], help="sizes of the checkpoints")
    parser.add_argument("--blocks", type=int, default=16, help="of the Llama for gptq; 0 leaves it out")
    parser.add_argument("--work", help="where the models go; by default a temporary folder")
    parser.add_argument("--name", default="memory", help="the result is docs/results/NAME.json")
    asked = parser.parse_args()
    floor = _run.subject("memory:imports").peak
    work = Path(tempfile.mkdtemp(prefix="memory-", dir=asked.work))
    try:
        rows = streamed(asked.gigabytes, work, floor)
        if asked.blocks:
            rows.append(blockwise(asked.blocks, work, floor))
    finally:
        shutil.rmtree(work)
    sizes = " ".join(f"{size:g}" for size in asked.gigabytes)
    _run.save(
        asked.name, "Peak resident memory of streaming from disk to disk",
        f"python benchmarks/memory.py --gigabytes {sizes} --blocks {asked.blocks}", rows, imports_megabytes=_run.megabytes(floor),
    )  # fmt: skip


if __name__ == "__main__":
    main()

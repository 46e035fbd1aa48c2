"""Lossless sizes of a bfloat16 checkpoint, beside the entropy of its exponents, zstd and xz; and how long coded models take to load.

    python benchmarks/lossless.py                       # a random Llama and the starter model
    python benchmarks/lossless.py --model DATA/model    # that model too, in bfloat16
    python benchmarks/lossless.py --blocks 0 --rounds 1 --name dry

All subjects use one thread and go from file to file; only the work is timed, not imports. `split` puts the first bytes of all values
before the second ones, which is what a general compressor needs to see the exponents. Encoding is run once, decoding some rounds.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import _run

LEVEL = 19  # of zstd
LARGE = dict(hidden_size=2048, intermediate_size=5632, num_attention_heads=32, num_key_value_heads=4, vocab_size=4096)
SMALL = dict(hidden_size=256, intermediate_size=704, num_attention_heads=8, num_key_value_heads=4, vocab_size=4096, num_hidden_layers=1)


def as_bfloat16(model: str, folder: str) -> None:
    """A model's folder with its floats in bfloat16."""
    import torch

    import modelwright as mw
    from modelwright.core.weights import Writer

    found = mw.open(model).checkpoint
    assert found is not None, model
    with Writer(folder) as out:
        for name in found.names:
            value = found.read(name)
            out.add(name, value.to(torch.bfloat16) if value.is_floating_point() else value)
        out.write_json("config.json", found.config | {"dtype": "bfloat16", "torch_dtype": "bfloat16"})


def bound(folder: str) -> float:
    """The bytes under which no code of single exponents gets, of all tensors together."""
    from modelwright.core.weights import Checkpoint
    from modelwright.maths.coded_floats import SPLITS, least_bytes

    found = Checkpoint(folder)
    return sum(least_bytes(found.read(name)) if found.dtype(name) in SPLITS else found.nbytes(name) for name in found.names)


def ours(folder: str, work: str, rounds: int) -> dict[str, Any]:
    """Compress and decompress with Modelwright."""
    import modelwright as mw
    from modelwright.core.weights import Checkpoint
    from modelwright.maths.coded_floats import decode, encode

    whole = Checkpoint(folder).read(next(name for name in Checkpoint(folder).names))
    decode(encode(whole), whole.dtype, whole.numel())  # compiles, or loads what was compiled
    seconds = [timed(lambda: mw.compress(folder, f"{work}/small"))]
    seconds += [timed(lambda: mw.decompress(f"{work}/small", f"{work}/again", overwrite=True)) for _ in range(rounds)]
    same(f"{folder}/model.safetensors", f"{work}/again/model.safetensors", Checkpoint)
    return {"bytes": Path(f"{work}/small/model.safetensors").stat().st_size, "encode": seconds[0], "decode": seconds[1:]}


def theirs(folder: str, work: str, rounds: int, tool: str) -> dict[str, Any]:
    """Compress and decompress the weight file with zstd or xz, as it is or with its bytes split."""
    import lzma

    import numpy
    import zstandard

    name, split = tool.split()[0], tool.endswith("split")

    def pack() -> None:
        data = Path(f"{folder}/model.safetensors").read_bytes()
        values = numpy.frombuffer(data[: len(data) // 2 * 2], numpy.uint8)
        data = values.reshape(-1, 2).T.tobytes() if split else data
        packed = zstandard.ZstdCompressor(level=LEVEL).compress(data) if name == "zstd" else lzma.compress(data)
        write(f"{work}/packed", packed)

    def unpack() -> None:
        packed = Path(f"{work}/packed").read_bytes()
        data = zstandard.ZstdDecompressor().decompress(packed) if name == "zstd" else lzma.decompress(packed)
        data = numpy.frombuffer(data, numpy.uint8).reshape(2, -1).T.tobytes() if split else data
        write(f"{work}/again", data)

    seconds = [timed(pack), *(timed(unpack) for _ in range(rounds))]
    assert Path(f"{work}/again").read_bytes() == Path(f"{folder}/model.safetensors").read_bytes(), tool
    return {"bytes": Path(f"{work}/packed").stat().st_size, "encode": seconds[0], "decode": seconds[1:]}


def write(file: str, data: bytes) -> None:
    """Write, and wait for the disk, as Modelwright does."""
    import os

    with open(file, "wb") as out:
        out.write(data)
        out.flush()
        os.fsync(out.fileno())


def same(one: str, two: str, checkpoint: Any) -> None:
    """Refuse files whose tensors differ in a bit."""
    import torch

    found = [checkpoint(one), checkpoint(two)]
    assert set(found[0].names) == set(found[1].names)
    for name in found[0].names:
        bits = [each.read(name).view(torch.uint8) for each in found]
        assert torch.equal(*bits), name


def timed(work: Any) -> float:
    """The seconds of a call."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def load(folder: str, rounds: int) -> dict[str, Any]:
    """Load a model with transformers, and let it read 128 tokens."""
    import torch
    from transformers import AutoModelForCausalLM

    import modelwright  # noqa: F401

    found: dict[str, Any] = {"load": [], "forward": []}
    for _ in range(rounds + 1):  # the first compiles
        started = time.perf_counter()
        model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
        loaded = time.perf_counter()
        with torch.no_grad():
            logits = model(torch.arange(128).unsqueeze(0)).logits
        found["load"].append(loaded - started)
        found["forward"].append(time.perf_counter() - loaded)
    return {key: values[1:] for key, values in found.items()} | {"sum": float(logits.double().sum())}


def coded(folder: str, save: str) -> None:
    """The model with `encode.dfloat11`."""
    import modelwright as mw
    from modelwright.methods.encode.dfloat11 import Dfloat11

    mw.apply(folder, Dfloat11(), save=save)


def measured(label: str, folder: Path, work: Path, rounds: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The rows of one checkpoint: sizes and speeds, and loading."""
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    _run.warm(folder)
    least = _run.subject("lossless:bound", folder=str(folder)).returned
    found = {}
    for subject in ("modelwright", f"zstd -{LEVEL}", f"zstd -{LEVEL}, split", "xz"):
        place = Path(tempfile.mkdtemp(dir=work))
        settings = {} if subject == "modelwright" else {"tool": subject.replace(",", "")}
        call = "lossless:ours" if subject == "modelwright" else "lossless:theirs"
        found[subject] = _run.subject(call, folder=str(folder), work=str(place), rounds=rounds, **settings).returned
        print(subject, found[subject], flush=True)
        shutil.rmtree(place)
    rows = [
        {
            "model": label, "subject": subject, "of the bytes": one["bytes"] / size, "over the entropy": one["bytes"] / least - 1,
            "encode MB a second": size / 1e6 / one["encode"], "decode MB a second": size / 1e6 / statistics.median(one["decode"]),
            "decode, times the seconds": statistics.median(one["decode"]) / statistics.median(found["modelwright"]["decode"]),
        }
        for subject, one in found.items()
    ]  # fmt: skip
    _run.subject("lossless:coded", folder=str(folder), save=str(work / "coded"))
    loads = {name: _run.subject("lossless:load", folder=str(place), rounds=rounds)
             for name, place in (("plain", folder), ("encode.dfloat11", work / "coded"))}  # fmt: skip
    assert len({one.returned["sum"] for one in loads.values()}) == 1, "the logits differ"
    places = {"plain": folder, "encode.dfloat11": work / "coded"}
    loading = [
        {
            "model": label, "weights": name, "file MB": places[name].joinpath("model.safetensors").stat().st_size / 1e6,
            "load seconds": statistics.median(one.returned["load"]), "128 tokens, seconds": statistics.median(one.returned["forward"]),
            "peak MB": _run.megabytes(one.peak),
        }
        for name, one in loads.items()
    ]  # fmt: skip
    return rows, loading


def main() -> None:
    """Make the models, run all subjects, print and save the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", default=[], help="a folder with a trained model, beside the starter model")
    parser.add_argument("--blocks", type=int, default=1, help="of the random model, of 88 MB each; 0 for a few MB")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--work", help="where the models go; by default a temporary folder")
    parser.add_argument("--name", default="lossless", help="the results are docs/results/NAME.json and NAME-load.json")
    asked = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="lossless-", dir=asked.work))
    rows: list[dict[str, Any]] = []
    loading: list[dict[str, Any]] = []
    try:
        for label in ("random", "starter", *asked.model):
            folder = work / "model"
            if label == "random":
                config = LARGE | {"num_hidden_layers": asked.blocks} if asked.blocks else SMALL
                nbytes = _run.subject("_models:random_llama", folder=str(folder), config=config).returned
                label = f"random Llama, {nbytes / 1e6:.0f} MB"
            else:
                _run.subject("lossless:as_bfloat16", model=label, folder=str(folder))
                label = Path(label).name
            for table, more in zip((rows, loading), measured(label, folder, work, asked.rounds), strict=True):
                table += more
            for place in work.iterdir():
                shutil.rmtree(place)
    finally:
        shutil.rmtree(work)
    models = "".join(f" --model {Path(model).name}" for model in asked.model)
    command = f"OMP_NUM_THREADS=1 python benchmarks/lossless.py --blocks {asked.blocks} --rounds {asked.rounds}{models}"
    _run.save(asked.name, "Checkpoints without loss in fewer bytes, one thread", command, rows)
    _run.save(f"{asked.name}-load", "Loading and running coded models, one thread", command, loading)


if __name__ == "__main__":
    main()

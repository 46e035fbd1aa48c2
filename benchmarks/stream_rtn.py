"""Rounding a checkpoint from disk to disk, beside copying the same bytes: time and peak memory.

    python benchmarks/stream_rtn.py                            # a random Llama of 4 GB in bfloat16
    python benchmarks/stream_rtn.py --gigabytes 0.05 --rounds 1 --name dry    # a dry run

Both find the checkpoint in the page cache, and end when what they wrote is on the disk. Seconds of Modelwright are those of
`apply`, without imports and compiled loops, which no size of a checkpoint changes; its peak memory counts them.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import _run

LIMIT = 700  # megabytes


def rounded(source: str, save: str, bits: int) -> float:
    """Seconds that `quantize.rtn` takes from folder to folder, flushing to the disk included."""
    import torch

    import modelwright as mw
    from modelwright.core.model import empty_module
    from modelwright.methods.quantize.rtn import Rtn

    method = Rtn(bits=bits)
    empty_module(mw.open(source).config)
    method.tensor(torch.zeros(512, 1024, dtype=torch.bfloat16))  # loads the compiled loops
    started = time.perf_counter()
    mw.apply(source, method, save=save)
    return time.perf_counter() - started


def main() -> None:
    """Make the model, round and copy it in turn, print and save the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=4.0, help="size of the checkpoint")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--work", help="where the model goes; by default a temporary folder")
    parser.add_argument("--name", default="stream-rtn", help="the result is docs/results/NAME.json")
    asked = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="stream-", dir=asked.work))
    source, save = work / "base", work / "out"

    def alone(run: Any) -> Any:
        """A subject that finds no result of another one, nor has the system still busy with it."""

        def started() -> _run.Measured:
            shutil.rmtree(save, ignore_errors=True)
            os.sync()
            return run()

        return started

    try:
        config = _run.subject("_models:config_of", gigabytes=asked.gigabytes).returned
        nbytes = _run.subject("_models:random_llama", folder=str(source), config=config).returned
        _run.warm(source)
        floor = _run.subject("memory:imports").peak
        found = _run.alternate({
            "quantize.rtn": alone(lambda: _run.subject("stream_rtn:rounded", source=str(source), save=str(save), bits=asked.bits)),
            "cp": alone(lambda: _run.run(["cp", "-r", source, save])),
        }, asked.rounds)  # fmt: skip
    finally:
        shutil.rmtree(work)
    for one in found["quantize.rtn"]:
        one.seconds = one.returned
    copied = _run.middle(found["cp"])
    rows = [
        {
            "subject": name, "checkpoint MB": _run.megabytes(nbytes), "seconds": _run.middle(measured),
            "processor seconds": _run.middle(measured, "processor"), "MB a second": nbytes / 1e6 / _run.middle(measured),
            "ratio": _run.middle(measured) / copied,
            "peak MB": _run.megabytes(_run.middle(measured, "peak")), "limit MB": LIMIT if name == "quantize.rtn" else None,
        }
        for name, measured in found.items()
    ]  # fmt: skip
    command = f"python benchmarks/stream_rtn.py --gigabytes {asked.gigabytes:g} --bits {asked.bits} --rounds {asked.rounds}"
    _run.save(asked.name, "Rounding from disk to disk, beside a copy", command, rows, imports_megabytes=_run.megabytes(floor))


if __name__ == "__main__":
    main()

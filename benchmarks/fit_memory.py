"""Peak resident memory of `modelwright fit`, phase by phase, against the bytes of the model.

    python benchmarks/fit_memory.py                  # a random Llama of 1.1 B parameters; hours on slow cores
    python benchmarks/fit_memory.py --blocks 2       # a dry run

The weights are random, so that only the memory means something. The model is fitted to 90 % in one trial: every phase runs,
and the most that a search holds does not depend on how many trials it has. The report has
one continuation, not three. Resident memory is read every 20 milliseconds;
pages of files that are mapped count. Recovery trains in float32 with AdamW, so it has a limit of its own: fit leaves it
out where it would not fit into the free memory, and here it is left out.
"""

from __future__ import annotations

import argparse
import functools
import shutil
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import _models
import _run

BUDGET = "90%"
TEXT = 60_000  # characters of the corpus: enough to score on


def make(folder: str, blocks: int) -> int:
    """A random Llama with the starter's tokenizer, and a text beside it. Returns the bytes of its weights."""
    from modelwright.core import data
    from modelwright.core.model import tokenizer_files
    from modelwright.starter import path

    nbytes = _models.random_llama(folder, _models.LARGE | {"num_hidden_layers": blocks})
    for file in tokenizer_files(path()):
        shutil.copyfile(file, Path(folder) / file.name)
    (Path(folder).parent / "text.txt").write_text("\n\n".join(data.corpus().documents)[:TEXT], "utf-8")
    return nbytes


def phases(work: str, tokens: int) -> dict[str, Any]:
    """Fit the model, and give the largest resident memory and the seconds of every phase."""
    import importlib

    fit: Any = importlib.import_module("modelwright.fit")
    now = ["read and score the original"]
    peaks: dict[str, int] = {}
    seconds: dict[str, float] = {}
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.02):
            peaks[now[0]] = max(peaks.get(now[0], 0), resident())

    def named(name: str, function: Any) -> Any:
        @functools.wraps(function)
        def inside(*arguments: Any, **others: Any) -> Any:
            before, now[0] = now[0], name
            started = time.perf_counter()
            try:
                return function(*arguments, **others)
            finally:
                now[0] = before
                seconds[name] = seconds.get(name, 0) + time.perf_counter() - started

        return inside

    for name, function in (("probe", "probe"), ("a trial", "try_out"), ("run the chosen recipe", "candidates_of"),
                           ("measure, write, report", "conclude")):  # fmt: skip
        setattr(fit, function, named(name, getattr(fit, function)))
    fit.with_recovery = lambda *_: []
    prompts = fit.prompts
    fit.prompts = lambda job: prompts(job)[:1]
    base = resident()
    threading.Thread(target=watch, daemon=True).start()
    started = time.perf_counter()
    fit.fit(f"{work}/model", budget=BUDGET, data=f"{work}/text.txt", save=f"{work}/small", quick=True, trials=1, tokens=tokens)
    over.set()
    return {"imports": base, "peaks": peaks, "seconds": seconds, "all": time.perf_counter() - started}


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def main() -> None:
    """Make the model, fit it, print and save the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=22, help="of the Llama; each has 44 M parameters")
    parser.add_argument("--tokens", type=int, default=256, help="of calibration in the trial")
    parser.add_argument("--work", help="where the models go; by default a temporary folder")
    parser.add_argument("--name", default="fit-memory", help="the result is docs/results/NAME.json")
    asked = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="fit-memory-", dir=asked.work))
    try:
        nbytes = _run.subject("fit_memory:make", folder=str(work / "model"), blocks=asked.blocks).returned
        found = _run.subject("fit_memory:phases", work=str(work), tokens=asked.tokens).returned
    finally:
        shutil.rmtree(work)
    floor = found["imports"]
    rows = [
        {
            "phase": name, "model MB": _run.megabytes(nbytes), "peak MB": _run.megabytes(peak),
            "without imports MB": _run.megabytes(peak - floor), "without imports / model": (peak - floor) / nbytes,
            "limit": 2.0, "seconds": found["seconds"].get(name),
        }
        for name, peak in found["peaks"].items()
    ]  # fmt: skip
    _run.save(
        asked.name, "Peak resident memory of a fit", f"python benchmarks/fit_memory.py --blocks {asked.blocks} --tokens {asked.tokens}",
        rows, imports_megabytes=_run.megabytes(floor),
    )  # fmt: skip


if __name__ == "__main__":
    main()

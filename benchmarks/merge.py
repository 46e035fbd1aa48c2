"""Merges against mergekit and a copy of all that they read: bfloat16 checkpoints in, one out.

python benchmarks/merge.py --peer-python PATH       # PATH: a Python with mergekit; by default this one
python benchmarks/merge.py --methods dare della ... # others than linear and ties
python benchmarks/merge.py --gigabytes 0.05         # a dry run
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import _run

LARGEST = 1 << 24  # values compared at a time
BOTH, ALL = ("first", "second"), ("base", "first", "second")


@dataclass(frozen=True)
class Case:
    """A merge, as both tools read it."""

    models: tuple[str, ...]
    parameters: dict[str, Any] = field(default_factory=dict)  # of each model
    shared: dict[str, Any] = field(default_factory=dict)
    base: bool = True


CASES = {
    "linear": Case(ALL, {"weight": 1.0}, base=False),
    "task_arithmetic": Case(BOTH, {"weight": 1.0}, {"lambda": 0.5}),
    "ties": Case(BOTH, {"weight": 1.0, "density": 0.2}, {"normalize": True}),
    "dare_linear": Case(BOTH, {"weight": 1.0, "density": 0.5}),
    "della": Case(BOTH, {"weight": 1.0, "density": 0.5, "epsilon": 0.15}),
    "breadcrumbs": Case(BOTH, {"weight": 1.0, "density": 0.9, "gamma": 0.01}),
    "slerp": Case(("base", "first"), {}, {"t": 0.5}),
    "nuslerp": Case(BOTH, {"weight": 1.0}, base=False),
    "model_stock": Case(BOTH),
    "sce": Case(BOTH, {}, {"select_topk": 0.5}),
    "karcher": Case(ALL, base=False),
    "arcee_fusion": Case(("base", "first")),
    "nearswap": Case(("base", "first"), {}, {"t": 0.001}),
    "passthrough": Case(("first",), base=False),
    "ram": Case(BOTH),
}


def ours(config: str, save: str) -> None:
    """Merge with Modelwright, by mergekit's configuration."""
    import modelwright as mw

    mw.merge(config, save=save)


def config_for(method: str, work: Path, dtype: str) -> str:
    """The configuration that both tools run, as YAML (JSON is YAML)."""
    case = CASES[method]
    models = [{"model": str(work / name), **({"parameters": case.parameters} if case.parameters else {})} for name in case.models]
    config = {"merge_method": method, "models": models, "parameters": case.shared, "dtype": dtype, "out_dtype": "bfloat16"}
    return json.dumps(config | ({"base_model": str(work / "base")} if case.base else {}))


def compare(left: str, right: str, work: str) -> dict[str, float]:
    """How two merged checkpoints differ: the share of values, the largest difference, and the root mean square one,
    the last over that of the left model's change from `base`."""
    from modelwright.core.weights import Checkpoint

    one, other, base = Checkpoint(left), Checkpoint(right), Checkpoint(f"{work}/base")
    assert set(one) == set(other), set(one) ^ set(other)
    values = unequal = 0
    largest = apart = change = 0.0
    for name in one:
        step = max(1, LARGEST // max(1, one.read_rows(name, 0, 1).numel()))
        for start in range(0, one.shape(name)[0], step):
            a, b, c = (part.read_rows(name, start, min(start + step, one.shape(name)[0])).float() for part in (one, other, base))
            change += float((a - c).square().sum(dtype=c.double().dtype))
            gap = a.sub_(b).abs_()
            values += gap.numel()
            unequal += int(gap.count_nonzero())
            largest = max(largest, float(gap.max()))
            apart += float(gap.square().sum(dtype=c.double().dtype))
    return {"values differing": unequal / values, "largest difference": largest, "of the change": (apart / max(change, 1e-300)) ** 0.5}


def measured(work: Path, peer: str, methods: list[str], rounds: int, peer_dtype: str) -> list[dict[str, Any]]:
    """A row for every method and subject."""
    rows = []
    for method in methods:
        (work / f"{method}.yaml").write_text(config_for(method, work, peer_dtype))
        mine, theirs, copied = (work / f"{method}-{name}" for name in ("ours", "peer", "copy"))
        read = [work / name for name in sorted({*CASES[method].models, *(["base"] if CASES[method].base else [])})]

        def fresh(folder: Path) -> Path:
            shutil.rmtree(folder, ignore_errors=True)
            return folder

        command = [peer, "-c", "from mergekit.scripts.run_yaml import main; main()", work / f"{method}.yaml"]
        subjects = {
            "modelwright": lambda method=method, mine=mine: _run.subject(
                "merge:ours", config=str(work / f"{method}.yaml"), save=str(fresh(mine))
            ),
            "mergekit": lambda command=command, theirs=theirs: _run.run([*command, fresh(theirs)]),
            "cp": lambda copied=copied, read=read: _run.run(["sh", "-c", 'mkdir "$0" && cp -r "$@" "$0"', fresh(copied), *read]),
        }
        found = _run.alternate(subjects, rounds)
        same = _run.subject("merge:compare", left=str(mine), right=str(theirs), work=str(work)).returned
        for name, times in found.items():
            rows.append({
                "method": method, "subject": name, "seconds": _run.middle(times), "processor seconds": _run.middle(times, "processor"),
                "peak MB": _run.megabytes(max(one.peak for one in times)),
                "ratio": _run.middle(times) / _run.middle(found["mergekit"]),
                "processor ratio": _run.middle(times, "processor") / _run.middle(found["mergekit"], "processor"),
                **(same if name == "mergekit" else {}),
            })  # fmt: skip
        for folder in (mine, theirs, copied):
            shutil.rmtree(folder)
    return rows


def main() -> None:
    """Make the models, run all subjects, print and save the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", default=sys.executable, help="a Python with mergekit")
    parser.add_argument("--gigabytes", type=float, default=1.6, help="size of each checkpoint")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--methods", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--peer-dtype", default="bfloat16", help="what mergekit computes in")
    parser.add_argument("--work", help="where the models go; by default a temporary folder")
    parser.add_argument("--name", default="merge", help="the result is docs/results/NAME.json")
    asked = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="merge-", dir=asked.work))
    try:
        config = _run.subject("_models:config_of", gigabytes=asked.gigabytes).returned
        for seed, name in enumerate(("base", "first", "second")):
            base = str(work / "base") if seed else None
            nbytes = _run.subject("_models:random_llama", folder=str(work / name), config=config, seed=seed, base=base).returned
        _run.warm(work)
        rows = measured(work, asked.peer_python, asked.methods, asked.rounds, asked.peer_dtype)
    finally:
        shutil.rmtree(work)
    _run.save(
        asked.name, f"Merging checkpoints of {nbytes / 1e9:.2f} GB each; mergekit computes in {asked.peer_dtype}",
        f"python benchmarks/merge.py --gigabytes {asked.gigabytes:g} --rounds {asked.rounds} --peer-dtype {asked.peer_dtype}"
        f" --methods {' '.join(asked.methods)} --peer-python PATH", rows, peer=asked.peer_python,
    )  # fmt: skip


if __name__ == "__main__":
    main()

"""Run each subject in a fresh process, and say how long it took and how much memory it held.

A subject is a function of a file beside this one, called in a process of its own by `subject`. What the function
returns comes back as JSON. The process that measures imports neither torch nor transformers: a child's largest
resident memory counts what its parent held when it was started.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RESULTS = HERE.parent / "docs" / "results"
PACKAGES = ("modelwright", "torch", "transformers", "mergekit", "llmcompressor", "torchao", "hqq", "bitsandbytes")
CALL = "import json, sys; from {module} import {name}; print('\\n' + json.dumps({name}(**json.loads(sys.argv[1]))))"


@dataclass
class Measured:
    """One process: wall and processor seconds, peak resident bytes (mapped files count), and what it returned."""

    seconds: float
    processor: float
    peak: int
    returned: Any = None


def run(command: Sequence[str | Path], env: Mapping[str, str] | None = None) -> Measured:
    """Run a command until what it wrote is on the disk. Raises SystemExit with the end of its output when it fails."""
    os.sync()  # so that no subject waits for what another one wrote
    with tempfile.TemporaryFile() as out:
        started = time.perf_counter()
        environment = os.environ | {"HF_HUB_OFFLINE": "1"} | dict(env or {})
        process = subprocess.Popen([str(part) for part in command], stdout=out, stderr=subprocess.STDOUT, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
        os.sync()
        seconds = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        text = out.read().decode(errors="replace")
    if process.returncode:
        raise SystemExit(f"{text[-4000:]}\nexit code {process.returncode}: {' '.join(map(str, command))[:300]}")
    try:
        returned = json.loads(text.rstrip().rpartition("\n")[2])
    except ValueError:
        returned = None
    return Measured(seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024, returned)


def subject(place: str, python: str = sys.executable, **arguments: Any) -> Measured:
    """Call `module:function` of this folder with keyword arguments in a process of its own."""
    module, _, name = place.partition(":")
    path = os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])])
    return run([python, "-c", CALL.format(module=module, name=name), json.dumps(arguments)], {"PYTHONPATH": path})


def alternate(subjects: Mapping[str, Callable[[], Measured]], rounds: int) -> dict[str, list[Measured]]:
    """Run all subjects once a round, every other round in reverse order, so that none always finds the warmer cache."""
    found: dict[str, list[Measured]] = {name: [] for name in subjects}
    for number in range(rounds):
        for name in list(subjects) if number % 2 == 0 else reversed(list(subjects)):
            print(f"round {number + 1} of {rounds}: {name} ...", end=" ", file=sys.stderr, flush=True)
            found[name].append(subjects[name]())
            print(f"{found[name][-1].seconds:.1f} s", file=sys.stderr)
    return found


def middle(measured: Sequence[Measured], field: str = "seconds") -> float:
    """The median of a field."""
    return statistics.median(getattr(one, field) for one in measured)


def warm(*folders: Path) -> None:
    """Read all files once, so that every subject finds them in the page cache."""
    for folder in folders:
        for file in folder.rglob("*.safetensors"):
            with open(file, "rb", buffering=0) as stream:
                while stream.read(1 << 24):
                    pass


def machine() -> dict[str, Any]:
    """What the numbers depend on and a ratio does not remove."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cores": os.cpu_count(),
        "threads": os.environ.get("OMP_NUM_THREADS", "default"),
        "memory_gigabytes": round(memory / 1e9, 1),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
    }


def versions(python: str = sys.executable) -> dict[str, str]:
    """The versions of the packages that matter in an environment."""
    if python == sys.executable:
        return version_table()
    return subject("_run:version_table", python=python).returned


def version_table() -> dict[str, str]:
    """The same, of this process's environment."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as a Markdown table."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [[_cell(row.get(column)) for column in columns] for row in rows]
    widths = [max(len(line[index]) for line in [columns, *cells]) for index in range(len(columns))]
    lines = [columns, ["-" * width for width in widths], *cells]
    return "\n".join("| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.3g}" if isinstance(value, float) and abs(value) < 100 else f"{value:.0f}" if isinstance(value, float) else str(value)


def save(name: str, title: str, command: str, rows: Sequence[Mapping[str, Any]], peer: str | None = None, **more: Any) -> None:
    """Print the table and write it to docs/results/<name>.json with the command and the machine."""
    print(f"\n{title}\n\n{table(rows)}\n")
    for key, value in more.items():
        print(f"{key}: {value}")
    RESULTS.mkdir(parents=True, exist_ok=True)
    content = {
        "title": title, "command": command, "machine": machine(), "versions": versions(),
        **({"peer_versions": versions(peer)} if peer else {}), "rows": list(rows), **more,
    }  # fmt: skip
    (RESULTS / f"{name}.json").write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def megabytes(count: float) -> int:
    """Bytes in whole megabytes (10⁶)."""
    return round(count / 1e6)

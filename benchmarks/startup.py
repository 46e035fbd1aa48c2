"""How long the command line takes to say something, beside importing torch.

python benchmarks/startup.py
"""

from __future__ import annotations

import argparse
import sys

import _run

COMMANDS = {
    "modelwright --help": ["-m", "modelwright", "--help"],
    "modelwright list": ["-m", "modelwright", "list"],
    "import modelwright": ["-c", "import modelwright"],
    "import torch": ["-c", "import torch"],
    "python alone": ["-c", ""],
}


def main() -> None:
    """Run every command some times; print and save the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--name", default="startup", help="the result is docs/results/NAME.json")
    asked = parser.parse_args()
    subjects = {name: lambda command=command: _run.run([sys.executable, *command]) for name, command in COMMANDS.items()}
    _run.alternate(subjects, 1)  # so that all files are in the page cache
    found = _run.alternate(subjects, asked.rounds)
    rows = [
        {
            "command": name, "seconds": _run.middle(times), "processor seconds": _run.middle(times, "processor"),
            "peak MB": _run.megabytes(_run.middle(times, "peak")), "ratio": _run.middle(times) / _run.middle(found["import torch"]),
        }
        for name, times in found.items()
    ]  # fmt: skip
    _run.save(asked.name, "Start of the command line", f"python benchmarks/startup.py --rounds {asked.rounds}", rows)


if __name__ == "__main__":
    main()

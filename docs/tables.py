"""Write the tables of README.md and docs/*.md from the measurements in docs/results/*.json.

    python docs/tables.py            write them
    python docs/tables.py --check    only say which are not up to date

A table stands between `<!-- table: NAME -->` and `<!-- end -->` and shows docs/results/NAME.json, the output of a command
with `--json` or of a benchmark: a list of rows, or an object with such a list under "table" or "rows". What else the
object says, the command and the machine, stands with the table.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"<!-- table: ([\w-]+) -->\n(.*?)<!-- end -->", re.DOTALL)


def block(found: Any) -> str:
    """The table with the command that made it and the machine that ran it, as far as they are known."""
    about = found if isinstance(found, dict) else {}
    command = f"```sh\n{about['command']}\n```\n\n" if "command" in about else ""
    line = "; ".join(
        label + ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in about[part].items())
        for part, label in (("machine", ""), ("versions", ""), ("peer_versions", "the other tool with "))
        if part in about
    )
    rows = found if isinstance(found, list) else found.get("table") or found["rows"]
    return command + table(rows) + (f"\n({line})\n" if line else "")


def table(rows: list[dict[str, Any]]) -> str:
    """Measurements as a Markdown table: measured models side by side, other rows one below the other."""
    from modelwright.report import COLUMNS, shown

    def cell(key: str, row: dict[str, Any]) -> str:
        value = row.get(key)
        rate = isinstance(value, float) and abs(value) >= 100 and (key not in COLUMNS or "second" in key)
        return f"{value:,.0f}" if rate else shown(key, row)

    hidden = {"perplexity_low", "perplexity_high", "notes"}
    keys = [key for key in dict.fromkeys(key for row in rows for key in row) if key not in hidden]
    lines = [[COLUMNS.get(key, key.replace("_", " ")), *(cell(key, row) for row in rows)] for key in keys]
    if {"model", "parameters"} <= set(keys):
        lines[0][0] = ""
    else:
        lines = [list(line) for line in zip(*lines, strict=True)]
    lines.insert(1, ["---", *["---:"] * (len(lines[0]) - 1)])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def filled(text: str) -> str:
    """A page with its tables written anew; a table without a file stays as it is."""

    def fill(place: re.Match[str]) -> str:
        file = ROOT / "docs" / "results" / f"{place[1]}.json"
        body = block(json.loads(file.read_text("utf-8"))) if file.is_file() else place[2]
        return f"<!-- table: {place[1]} -->\n{body}<!-- end -->"

    return BLOCK.sub(fill, text)


def main() -> None:
    """Write or check every page."""
    old = []
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        before = page.read_text("utf-8")
        after = filled(before)
        if before != after:
            old.append(page.relative_to(ROOT).as_posix())
            if "--check" not in sys.argv:
                page.write_text(after, "utf-8")
    if old:
        print("not up to date:" if "--check" in sys.argv else "wrote", ", ".join(old))
    if old and "--check" in sys.argv:
        sys.exit(1)


if __name__ == "__main__":
    main()

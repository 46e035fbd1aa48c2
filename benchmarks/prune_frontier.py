"""Perplexity against bytes of a model pruned and factored by every method, and which methods are dominated.

python benchmarks/prune_frontier.py --model starter --data corpus --name starter
python benchmarks/prune_frontier.py --model DATA/models/stories260k-llama --data DATA/text/tinystories_sample.txt --name stories260k

Zeros are counted as they are stored sparse. A point is dominated when another has no more bytes and no more perplexity.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import _run

SHARES = (0.25, 0.5, 0.7)
SPARSE = ("magnitude", "wanda", "ria", "sparsegpt", "alps")
QUALITY = "token perplexity"
KEPT = ("svd", "asvd", "svd_llm")


def settings(depths: int) -> dict[str, Callable[[float], dict[str, Any]]]:
    """Method -> its settings for the share that goes."""
    blocks = {
        "prune.shortgpt": lambda share: {"blocks": round(share * depths)},
        "prune.blockpruner": lambda share: {"branches": round(share * 2 * depths)},
        "prune.slicegpt": lambda share: {"keep": 1 - share},
    }
    units = {
        "prune.flap": lambda share: {"share": share}, "prune.llm_pruner": lambda share: {"share": share, "spare_first": 1, "spare_last": 1},
        "prune.adapt_pruner": lambda share: {"share": share, "steps": 10},
    }  # fmt: skip
    weights = {f"prune.{name}": lambda share: {"sparsity": share, "store": "sparse"} for name in SPARSE}
    return weights | {f"factor.{name}": lambda share: {"keep": 1 - share} for name in KEPT} | units | blocks


def main() -> None:
    """Apply, measure, compare, and write the table and the plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True, help="text; a part of it is set aside to score on")
    parser.add_argument("--name", required=True, help="the result is docs/results/prune-NAME.json and .svg")
    parser.add_argument("--methods", nargs="+", help="such as prune.wanda; by default all, of which those with gradients take minutes")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--scored", type=int, default=20_000, help="tokens that perplexity is measured on")
    asked = parser.parse_args()

    import modelwright as mw
    from modelwright.core import data, find
    from modelwright.core.errors import ModelwrightError
    from modelwright.core.measure import quality, sizes

    calibration, scored = data.read(asked.data).split()
    original = mw.open(asked.model)
    depths = original.config.get_text_config().num_hidden_layers

    def row(method: str, share: float, model: Any, seconds: float) -> dict[str, Any]:
        return {
            "method": method, "share": share, "bytes": sizes(model)["bytes_memory"], "seconds": seconds,
            QUALITY: quality(model, scored, asked.length, asked.scored)["perplexity"],
        }  # fmt: skip

    rows = [row("original", 0.0, original, 0.0)]
    for name, chosen in {name: one for name, one in settings(depths).items() if name in (asked.methods or settings(depths))}.items():
        for share in SHARES:
            if name not in find.names():
                continue
            started = time.perf_counter()
            try:
                method = find.find(name).build(chosen(share))
                model = mw.apply(mw.open(asked.model), method, data=calibration, samples=asked.samples, length=asked.length)
            except ModelwrightError as error:
                print(f"{name} at {share}: {error}", file=sys.stderr)
                continue
            rows.append(row(name, share, model, time.perf_counter() - started))
            print(rows[-1], file=sys.stderr)
    for one in rows:
        better = [other for other in rows if other["bytes"] <= one["bytes"] and other[QUALITY] <= one[QUALITY] and other is not one]
        one["dominated by"] = min(better, key=lambda other: other[QUALITY])["method"] if better else ""
    first = "corpus" if asked.data == "corpus" else f"DATA/text/{Path(asked.data).name}"
    model = asked.model if asked.model == "starter" else f"DATA/models/{Path(asked.model).name}"
    command = f"python benchmarks/prune_frontier.py --model {model} --data {first} --name {asked.name}"
    command += f" --methods {' '.join(asked.methods)}" if asked.methods else ""
    _run.save(f"prune-{asked.name}", f"{asked.name}, pruned and factored", command, rows)
    (_run.RESULTS / f"prune-{asked.name}.svg").write_text(plot(rows), "utf-8")


def plot(rows: list[dict[str, Any]]) -> str:
    """Bytes against perplexity, a line for each method."""
    from modelwright import report

    figure, axes = report.figure_of(7.6, 4.6)
    names = list(dict.fromkeys(one["method"] for one in rows[1:]))
    for number, name in enumerate(names):
        points = [rows[0], *(one for one in rows if one["method"] == name)]
        axes.plot([one["bytes"] / 1e6 for one in points], [one[QUALITY] for one in points], marker="osD^v"[number % 5], ms=4, lw=1,
                  label=name, color=f"C{number % 10}", ls=("-", "--", ":")[number // 10 % 3])  # fmt: skip
    axes.set_yscale("log")
    axes.set_xlabel("bytes stored, MB")
    axes.set_ylabel("perplexity")
    axes.set_xlim(left=0)
    axes.legend(frameon=False, fontsize=8, ncols=2)
    return report.svg_of(figure)


if __name__ == "__main__":
    main()

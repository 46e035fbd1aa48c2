"""Perplexity against bytes of a model pruned, factored and shared by every method, and which methods are dominated.

python benchmarks/prune_frontier.py --model starter --data corpus --name starter --recover 100000
python benchmarks/prune_frontier.py --model DATA/models/stories260k-llama --data DATA/text/tinystories_sample.txt --name stories260k
python benchmarks/prune_frontier.py --model encoder --data DATA/text/tinystories_sample.txt --name encoder

Zeros are counted as they are stored sparse. With --recover, each result is then trained towards the original on so many tokens, and
methods that train are shown too, with as many. A point is dominated when another has no more bytes and no more perplexity.
`encoder` is a small BERT that is trained here; its perplexity is that of one token in seven, each hidden with its place marked.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import _encoder
import _frontier
import _run

SHARES = (0.25, 0.5, 0.7)
SPARSE = ("magnitude", "wanda", "ria", "sparsegpt", "alps")
PLAIN, AFTER = "token perplexity", "recovered"
Settings = Callable[[float], dict[str, Any] | None]


def settings(depths: int, width: int) -> dict[str, Settings]:
    """Method -> its settings for the share that goes; None where it has none for it."""
    inner = max(8, width // 8)
    units: dict[str, Settings] = {
        "prune.flap": lambda share: {"share": share}, "prune.prunenet": lambda share: {"share": share},
        "prune.llm_pruner": lambda share: {"share": share, "spare_first": 1, "spare_last": 1},
        "prune.adapt_pruner": lambda share: {"share": share, "steps": 10},
        "prune.loraprune": lambda share: {"share": share, "spare_first": 1, "spare_last": 1, "learning_rate": 3e-3, "every": 1},
        "prune.efficientllm": lambda share: {"share": share, "every": 1},
    }  # fmt: skip
    blocks: dict[str, Settings] = {
        "prune.shortgpt": lambda share: {"blocks": round(share * depths)},
        "prune.blockpruner": lambda share: {"branches": round(share * 2 * depths)},
        "prune.das": lambda share: {"branches": round(share * 2 * depths), "inner": inner, "beside": inner // 2, "steps": 100},
        "prune.slicegpt": lambda share: {"keep": 1 - share},
        "prune.pat": lambda share: {"keep": 1 - share, "mixing": width // 4, "learning_rate": 3e-3},
    }  # fmt: skip
    shared: dict[str, Settings] = {
        "share.depth": lambda share: {"loops": round(1 / (1 - share)), "spare_last": 0},
        "share.foldgpt": lambda share: {"blocks": round(share * depths / 2), "spare_first": 0, "spare_last": 0},
        "share.roast": lambda share: {"keep": 1 - share},
        "share.graphhash": lambda share: {"keep": 1 - share},
    }
    stored = {"store": "sparse"}
    weights: dict[str, Settings] = {f"prune.{name}": lambda share: {"sparsity": share, **stored} for name in SPARSE}
    weights["prune.gaprune"] = lambda share: {"sparsity": share, **stored}
    weights["prune.armor"] = lambda share: {"width": 4, "iterations": 2000} if share == 0.5 else None
    weights["prune.gradual"] = lambda share: {"sparsity": share, "every": 1}
    factors: dict[str, Settings] = {f"factor.{name}": lambda share: {"keep": 1 - share} for name in ("svd", "svd_llm", "pela")}
    factors["factor.asvd"] = lambda share: {"keep": 1 - share, "keeps": (0.2, 0.4, 0.6, 0.8)}
    return weights | factors | units | blocks | shared


def main() -> None:
    """Apply, measure, compare, and write the table and the plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a model, or `encoder`")
    parser.add_argument("--data", required=True, help="text; a part of it is set aside to score on")
    parser.add_argument("--name", required=True, help="the result is docs/results/prune-NAME.json and .svg")
    parser.add_argument("--methods", nargs="+", help="such as prune.wanda; by default all")
    parser.add_argument("--add", action="store_true", help="keep what the result has of other methods from before")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--scored", type=int, default=20_000, help="tokens that perplexity is measured on")
    parser.add_argument("--recover", type=int, default=0, help="tokens to train on afterwards")
    asked = parser.parse_args()

    model, text = _frontier.source(asked.model, "models"), _frontier.source(asked.data, "text")
    command = f"python benchmarks/prune_frontier.py --model {model} --data {text} --name {asked.name}"
    others = {name: getattr(asked, name) for name in ("samples", "length", "scored", "recover")}
    command += "".join(f" --{name} {value}" for name, value in others.items() if value != parser.get_default(name))
    if asked.add:
        before = json.loads((_run.RESULTS / f"prune-{asked.name}.json").read_text("utf-8"))
        if before["command"].partition("\n")[0].partition(" --methods")[0] != command:
            parser.error(f"--add goes with the settings of before; these were: {before['command']}")

    import modelwright as mw
    from modelwright import small
    from modelwright.core import data, find, loading
    from modelwright.core.errors import ModelwrightError
    from modelwright.core.measure import quality, sizes

    calibration, scored = data.read(asked.data).split()
    encoder = asked.model == "encoder"
    asked.length = small.LENGTH if encoder else asked.length  # it has seen no place beyond
    source = small.encoder(calibration, Path(tempfile.mkdtemp(prefix="encoder-"))) if encoder else asked.model
    original = mw.open(source)
    config = original.config.get_text_config()
    training = {"tokens": asked.recover, "batch": 16, "length": asked.length}

    def perplexity(model: Any) -> float:
        if encoder:
            return _encoder.perplexity(model, scored, asked.length, asked.scored)
        return quality(model, scored, asked.length, asked.scored)["perplexity"]

    def size(model: Any) -> int:
        """Bytes, with matrices of many zeros as they would be stored sparse, by the sparse form's own count."""
        total = sizes(model)["bytes_memory"]
        for layer in model.module.modules() if not loading.described(model.module) else ():
            weight = getattr(layer, "weight", None)
            if weight is not None and weight.ndim == 2 and (zeros := int((weight == 0).sum())) > weight.numel() // 8:
                total += weight.numel() // 8 - zeros * weight.element_size()
        return total

    rows = [{"method": "original", "share": 0.0, "bytes": size(original), PLAIN: perplexity(original), AFTER: None, "seconds": 0.0}]
    chosen = settings(config.num_hidden_layers, config.hidden_size)
    for name in asked.methods or chosen:
        trains = "train" in find.find(name).needs()
        for share in SHARES:
            stated = chosen[name](share)
            if stated is None or trains and not asked.recover:
                continue
            started = time.perf_counter()
            try:
                method = find.find(name).build(stated | (training if trains else {}))
                given = {"teacher": mw.open(source)} if "teacher" in method.needs() else {}
                model = mw.apply(mw.open(source), method, data=calibration, samples=asked.samples, length=asked.length, **given)
                took, found = time.perf_counter() - started, perplexity(model)
                row = {"method": name, "share": share, "bytes": size(model), PLAIN: None if trains else found, "seconds": took}
                row[AFTER] = found if trains else None
                if asked.recover and not trains and not encoder:
                    recover = find.find("distill.recover").build(training)
                    row[AFTER] = perplexity(mw.apply(model, recover, data=calibration, teacher=mw.open(source)))
            except ModelwrightError as error:
                print(f"{name} at {share}: {error}", file=sys.stderr)
                continue
            rows.append(row)
            print(rows[-1], file=sys.stderr, flush=True)
    if asked.add:
        own = {row["method"] for row in rows}
        rows = [rows[0], *({PLAIN: None, AFTER: None} | row for row in before["rows"] if row["method"] not in own), *rows[1:]]
    _frontier.mark_dominated(rows, "bytes", PLAIN, "dominated by")
    _frontier.mark_dominated(rows, "bytes", AFTER, "recovered, dominated by")
    if not asked.recover or encoder:
        rows = [{key: value for key, value in row.items() if AFTER not in key} for row in rows]
    if asked.methods:
        command += f" --methods {' '.join(asked.methods)}"
    if asked.add:
        command = f"{before['command']}\n{command} --add"
    _run.save(f"prune-{asked.name}", f"{asked.name}, pruned, factored and shared", command, rows)
    titles = {PLAIN: "perplexity", AFTER: "perplexity after training"}
    panels = {key: title for key, title in titles.items() if any(row.get(key) is not None for row in rows[1:])}
    image = _frontier.plot(rows, "bytes", panels, "bytes stored, MB", divided=1e6, begins=True)
    (_run.RESULTS / f"prune-{asked.name}.svg").write_text(image, "utf-8")


if __name__ == "__main__":
    main()

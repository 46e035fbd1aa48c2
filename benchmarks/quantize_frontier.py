"""Perplexity against measured bits per weight of a model quantised by every method, and which methods are dominated.

python benchmarks/quantize_frontier.py --model starter --data corpus --name starter
python benchmarks/quantize_frontier.py --model DATA/models/stories260k-llama --data DATA/text/tinystories_sample.txt --name stories260k

Bits count everything that is stored for the matrices that were worked on: codes, scales, zero points, tables. Text to calibrate on and
text to score on are apart. What rounds while it trains learns from the original on 200,000 tokens and is packed then; the others
see no gradient. A point is dominated when another has no more bits and no more perplexity.
"""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any

import _frontier
import _run

QUALITY = "token perplexity"
BITS = "bits per weight"
TRAINING = {"tokens": 200_000, "batch": 16, "length": 128}


def settings(width: int) -> list[tuple[str, list[tuple[str, dict[str, Any]]]]]:
    """The line of a plot -> its points: the steps that make each."""
    group = 64 if width % 64 == 0 else 32

    def line(name: str, key: str, values: tuple[float, ...], **others: Any) -> tuple[str, list[Any]]:
        return name, [[(name.partition(",")[0].partition(" after")[0], {key: value, **others})] for value in values]

    def turned(name: str, method: str, **others: Any) -> tuple[str, list[Any]]:
        return name, [[("quantize.rotate", {}), (method, {"bits": bits, "group": group, **others})] for bits in (2, 3, 4)]

    def trained(name: str, **given: Any) -> tuple[str, list[Any]]:
        return f"{name}, trained", [[(name, given), ("distill.recover", TRAINING), ("quantize.pack", {})]]

    one = [("quantize.mxfp4", {}), ("quantize.nvfp4", {}), ("quantize.nf4", {"group": group}), ("quantize.fp8", {}),
           ("quantize.smoothquant", {}), ("quantize.llm_int8", {}), ("encode.dfloat11", {})]  # fmt: skip
    whole = {"group": group}
    return [
        line("quantize.rtn", "bits", (2, 3, 4, 5, 8), **whole),
        line("quantize.rtn, zero points", "bits", (2, 3, 4), symmetric=False, **whole),
        line("quantize.rtn, search", "bits", (2, 3, 4), search=True, **whole),
        line("quantize.rtn, k-means", "bits", (2, 3, 4), grid="k-means", **whole),
        line("quantize.hqq", "bits", (2, 3, 4), **whole),
        line("quantize.gptq", "bits", (2, 3, 4), **whole),
        line("quantize.gptq, zero points, order, search", "bits", (2, 3, 4), symmetric=False, order=True, search=True, **whole),
        ("quantize.gptq, nf4", [[("quantize.gptq", {"grid": "nf4", "group": group, "nested": True})]]),
        line("quantize.awq", "bits", (2, 3, 4), **whole),
        line("quantize.mixed", "bits", (2.25, 2.5, 3, 3.5, 4), **whole),
        line("quantize.bipolar", "bits", (2, 3, 4), **whole),
        line("quantize.mergequant", "bits", (4, 6, 8), inputs=8),
        line("encode.bitstack", "terms", (1, 2, 3), rank=4, measure="error"),
        trained("quantize.bitlinear"),
        trained("quantize.fairy2i", terms=1),
        trained("quantize.fairy2i", terms=2),
        turned("quantize.rtn after rotate", "quantize.rtn"),
        turned("quantize.gptq after rotate", "quantize.gptq"),
        line("quantize.smoothquant, few bits", "bits", (4, 6), inputs=8),
        *((name, [[(name, given)]]) for name, given in one),
    ]


def main() -> None:
    """Apply, measure, compare, and write the table and the plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True, help="text; a part of it is set aside to score on")
    parser.add_argument("--name", required=True, help="the result is docs/results/quantize-NAME.json and .svg")
    parser.add_argument("--methods", nargs="+", help="words that a line's name must hold one of; by default all lines")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--scored", type=int, default=20_000, help="tokens that perplexity is measured on")
    asked = parser.parse_args()

    import modelwright as mw
    from modelwright.core import data, find
    from modelwright.core.errors import ModelwrightError
    from modelwright.core.measure import quality

    calibration, scored = data.read(asked.data).split()
    original = mw.open(asked.model)

    def perplexity(model: Any) -> float:
        return quality(model, scored, asked.length, asked.scored)["perplexity"]

    rows = [{"method": "original", "settings": "", BITS: 16.0, QUALITY: perplexity(original), "seconds": 0.0}]
    for name, points in settings(original.config.get_text_config().hidden_size):
        if asked.methods and not any(word in name for word in asked.methods):
            continue
        for steps in points:
            model, started = mw.open(asked.model), time.perf_counter()
            try:
                for step, given in steps:
                    method = find.find(step).build(given)
                    more = {"teacher": mw.open(asked.model)} if "teacher" in method.needs() else {}
                    model = mw.apply(model, method, data=calibration, samples=asked.samples, length=asked.length, **more)
            except ModelwrightError as error:
                print(f"{name} {steps}: {error}", file=sys.stderr)
                continue
            took = time.perf_counter() - started
            stated = next((given for step, given in steps if step in name), steps[-1][1])
            shown = ", ".join(f"{key} {value}" for key, value in stated.items())
            size = _frontier.stored_bits(model.module)
            rows.append({"method": name, "settings": shown, BITS: size, QUALITY: perplexity(model), "seconds": took})
            print(rows[-1], file=sys.stderr, flush=True)
    _frontier.mark_dominated(rows, BITS, QUALITY, "dominated by")
    model, text = _frontier.source(asked.model, "models"), _frontier.source(asked.data, "text")
    command = f"python benchmarks/quantize_frontier.py --model {model} --data {text} --name {asked.name}"
    command += f" --methods {' '.join(asked.methods)}" if asked.methods else ""
    _run.save(f"quantize-{asked.name}", f"{asked.name}, quantised", command, rows)
    image = _frontier.plot(rows, BITS, {QUALITY: "perplexity"}, "bits per weight, everything counted")
    (_run.RESULTS / f"quantize-{asked.name}.svg").write_text(image, "utf-8")


if __name__ == "__main__":
    main()

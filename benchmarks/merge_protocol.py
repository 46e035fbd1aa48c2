"""Three experts of the starter on three unlike kinds of text, merged by every method and scored.

python benchmarks/merge_protocol.py --data DATA            # DATA: a folder with text/grimm.txt and so on
python benchmarks/merge_protocol.py --data DATA --tokens 8192 --scored 2000   # a dry run
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import _run

KINDS = {"tales": "text/grimm.txt", "plays": "text/tinyshakespeare.txt", "papers": "text/arxiv.jsonl"}
UNSEEN = "text/bronte.txt"
SETTINGS = {  # those that differ from the defaults
    "task_arithmetic": {"scale": 0.4}, "dare": {"keep": 0.5, "scale": 0.4}, "breadcrumbs": {"scale": 0.4}, "evolve": {"trials": 30},
}  # fmt: skip


def main() -> None:
    """Train the experts that are missing, merge, score, and write the table and the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, type=Path, help="the folder with the texts")
    parser.add_argument("--experts", type=Path, default=Path("experts"), help="where the experts are, or go")
    parser.add_argument("--tokens", type=int, default=400_000, help="that each expert is trained on")
    parser.add_argument("--scored", type=int, default=20_000, help="tokens scored on, of each text")
    parser.add_argument("--name", default="merge-protocol", help="the result is docs/results/NAME.json")
    asked = parser.parse_args()
    texts = {name: str(asked.data / file) for name, file in KINDS.items()}
    recipe = Path(__file__).parents[1] / "recipes" / "expert.yaml"
    for name, text in texts.items():
        if not (asked.experts / name).is_dir():
            overrides = [f"data={{source: {text}, held: 0.1}}", f"save={asked.experts / name}", f"steps.0.tokens={asked.tokens}"]
            _run.run([sys.executable, "-m", "modelwright", "run", recipe, *[part for text in overrides for part in ("--set", text)]])

    import modelwright as mw
    from modelwright import protocol

    base = mw.open("starter").folder
    experts = {name: asked.experts / name for name in texts}
    kinds = protocol.Kinds(experts=texts, unseen=str(asked.data / UNSEEN), own="corpus", tokens=asked.scored)
    rows = protocol.merges(base, experts, kinds, protocol.every_method(len(experts), **SETTINGS))
    conflicts = protocol.interference(base, experts)
    command = f"python benchmarks/merge_protocol.py --data DATA --tokens {asked.tokens} --scored {asked.scored}"
    _run.save(asked.name, "Three experts of the starter, merged", command, rows)
    (asked.experts / "merges.html").write_text(protocol.page(rows, conflicts), "utf-8")
    print(f"open {asked.experts / 'merges.html'} for the plots")


if __name__ == "__main__":
    main()

"""What `plan` predicts for a step, beside what the run of that step measures: peak memory and time.

    python benchmarks/plan.py                            # the starter, and a random Llama of 320 MB
    python benchmarks/plan.py --models DATA/models/*     # and these
    python benchmarks/plan.py --steps prune.wanda train  # only these
    python benchmarks/plan.py --again                    # predict anew, and keep what was measured

Every step runs in a process of its own, as the only step of a recipe. The peak is the largest resident memory while the
step runs, as its account has it; the time is what the step takes without the checks before and the sizes after it.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import _run

LLAMA = dict(hidden_size=1024, intermediate_size=2816, num_hidden_layers=8, num_attention_heads=16, num_key_value_heads=8, vocab_size=32000)
INPUTS = {"distill.recover": ["teacher"], "merge.ties": ["donors", "base"]}
FEW = dict(tokens=8192, batch=8, length=256)  # of text to train on
STEPS: dict[str, dict[str, Any]] = {
    "prune.magnitude": {}, "prune.wanda": {}, "prune.sparsegpt": {}, "quantize.rtn": {}, "quantize.gptq": {}, "factor.svd": {},
    "factor.svd_llm": {}, "prune.shortgpt": {"blocks": 1}, "merge.ties": {}, "adapt.lora": {}, "distill.recover": FEW, "train": FEW,
}  # fmt: skip
TEXT = {"few": dict(samples=16, length=256), "many": dict(samples=128, length=512)}


def llama(folder: str) -> None:
    """Write the random Llama with the starter's tokenizer, so that it can be given text."""
    from _models import random_llama

    import modelwright as mw
    from modelwright.core.model import tokenizer_files

    random_llama(folder, LLAMA)
    found = mw.open("starter").folder
    assert found is not None
    for file in tokenizer_files(found):
        shutil.copy(file, folder)


def predict(model: str, name: str, settings: dict[str, Any], text: dict[str, int], save: str) -> dict[str, Any]:
    """Predict a recipe of one step."""
    from modelwright.core import plan

    row = plan.plan(made(model, name, settings, text, save)).rows[1]
    return {"peak": row.peak_bytes, "time": row.time}


def run(model: str, name: str, settings: dict[str, Any], text: dict[str, int], save: str) -> dict[str, Any]:
    """Predict a recipe of one step, and run it."""
    from modelwright.core import recipe

    expected = predict(model, name, settings, text, save)
    found = recipe.run(made(model, name, settings, text, save), overwrite=True).account[1]
    return expected | {"measured": found["peak_bytes"], "seconds": found["seconds"]}


def made(model: str, name: str, settings: dict[str, Any], text: dict[str, int], save: str) -> Any:
    """The recipe."""
    from modelwright.core import recipe
    from modelwright.core.find import find

    needs = find(name).needs()
    given = {need: [model, model] if need == "donors" else model for need in INPUTS.get(name, []) if need in needs}
    return recipe.read({"model": model, "data": "corpus", "steps": [{name: given | settings}], "save": save, **text})


def main() -> None:
    """Run every step on every model, print and save the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=[], help="folders of models, beside the starter and the random Llama")
    parser.add_argument("--steps", nargs="*", default=list(STEPS), help="methods")
    parser.add_argument("--again", action="store_true", help="predict anew, and keep what the result's file says was measured")
    parser.add_argument("--work", help="where models go; by default a temporary folder")
    parser.add_argument("--name", default="plan", help="the result is docs/results/NAME.json")
    asked = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="plan-", dir=asked.work))
    file = _run.RESULTS / f"{asked.name}.json"
    before = json.loads(file.read_text("utf-8"))["rows"] if asked.again else []
    known = {(row["model"], row["step"]): row for row in before}
    rows = []
    try:
        _run.subject("plan:llama", folder=str(work / "llama"))
        models = {"starter": ("starter", "many"), "random Llama, 320 MB": (str(work / "llama"), "few")}
        models |= {Path(folder).name: (folder, "many") for folder in asked.models}
        for shown, (model, text) in models.items():
            for name in asked.steps:
                settings = dict(model=model, name=name, settings=STEPS[name], text=TEXT[text], save=str(work / "out"))
                found = _run.subject(f"plan:{'predict' if asked.again else 'run'}", **settings).returned
                old = known.get((shown, name), {})
                predicted = _run.megabytes(found["peak"])
                measured = old["measured MB"] if asked.again else _run.megabytes(found["measured"])
                rows.append({
                    "model": shown, "step": name, "predicted MB": predicted, "measured MB": measured,
                    "predicted / measured": predicted / measured, "predicted time": found["time"],
                    "measured seconds": old["measured seconds"] if asked.again else found["seconds"],
                })  # fmt: skip
                print(_run.table(rows[-1:]).splitlines()[-1], flush=True)
    finally:
        shutil.rmtree(work)
    models_said = " --models " + " ".join(f"DATA/models/{Path(folder).name}" for folder in asked.models) if asked.models else ""
    title = "What the plan predicts of a step, and what its run measures"
    _run.save(asked.name, title, f"python benchmarks/plan.py{models_said}", rows)


if __name__ == "__main__":
    main()

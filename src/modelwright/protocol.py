"""What merging pays and costs: every method on the same experts, scored as the studies of merging do.

The rows are those of "What Matters for Model Merging at Scale" (2410.03617) and MergeBench (2505.10833): how well the merged
model does on each expert's kind of text against that expert, on a kind that no expert saw against the base, and how
much of the base's own kind it has forgotten. A score is a likelihood per token, so that a ratio of scores is the inverse
ratio of perplexities: 1 is as good as the reference, less is worse.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from . import __version__, report
from .anatomy import anatomy_of
from .core import data as texts
from .core.errors import SettingError, refuse
from .core.find import find
from .core.measure import window_losses
from .core.method import Method
from .core.model import Model, open
from .core.progress import track
from .core.weights import Checkpoint
from .maths.task_vectors import trimmed

WORK = """
import json, sys, time
import modelwright as mw
from modelwright.core.measure import peak_memory
name, settings, base, donors, text, samples, save = json.loads(sys.argv[1])
started = time.perf_counter()
with peak_memory() as memory:
    mw.apply(base, mw.find(name).build(settings), donors=donors, data=text, samples=samples, save=save)
print(json.dumps([time.perf_counter() - started, memory.bytes]))
"""

CHARACTERS = 200_000  # of each expert's text where all calibrate together
OTHERS = ("adapters", "extract", "moe", "transplant")  # make adapters, mixtures or other vocabularies


@dataclass(frozen=True)
class Kinds:
    """The texts of a comparison: one source for each expert, one that none saw, and the base's own."""

    experts: Mapping[str, Any]  # name of the expert -> its text; a tenth of it is held out and scored on
    unseen: Any
    own: Any
    tokens: int = 20_000  # scored on, of each
    samples: int = 32  # calibration sequences, for methods that ask for some

    def held(self) -> dict[str, texts.Text]:
        """The text of each kind that is scored on."""
        named = {**self.experts, "unseen": self.unseen, "own": self.own}
        return {name: texts.read(source).split(0.1)[1] for name, source in named.items()}


def merges(base: str | Path, experts: Mapping[str, str | Path], kinds: Kinds, methods: Mapping[str, Method]) -> list[dict[str, Any]]:
    """A row for the base, for each expert and for each method, with scores, seconds and peak memory.

    base, experts: folders. methods: by the name that their row shall have. Each merge runs in a process of its own, so
    that its peak memory is its own.

    Columns: `held-in`, the mean over experts of the score on their text over that expert's; one column for each; `held-out`,
    the score on unseen text over the base's; `forgetting`, 1 - the score on the base's own text over the base's.

    Raises:
        SettingError: experts and texts have other names.
    """
    refuse(SettingError, [f"The expert {name!r} has no text, or the text no expert." for name in set(experts) ^ set(kinds.experts)])
    held = kinds.held()
    known = {name: nats(open(folder), held, kinds.tokens) for name, folder in {"base": base, **experts}.items()}
    rows = [row(name, scores, known, list(experts)) for name, scores in known.items()]
    with tempfile.TemporaryDirectory(prefix="merges-") as work:
        for label, method in track(list(methods.items()), "merging"):
            folder = Path(work) / "merged"
            told, text = calibrated(method, kinds, Path(work))
            donors = [str(each) for each in experts.values()]
            seconds, peak = in_process([told.name(), told.settings(), str(base), donors, text, kinds.samples, str(folder)])
            found = row(label, nats(open(folder), held, kinds.tokens), known, list(experts))
            rows.append(found | {"seconds": seconds, "peak MB": round(peak / 1e6)})
            shutil.rmtree(folder)
    return rows


def row(label: str, scores: Mapping[str, float], known: Mapping[str, Mapping[str, float]], experts: list[str]) -> dict[str, Any]:
    """One row of the table, from nats per token: of the model, and of the base and the experts."""
    against = {name: math.exp(known[name][name] - scores[name]) for name in experts}
    return {
        "model": label,
        "held-in": sum(against.values()) / len(against),
        **against,
        "held-out": math.exp(known["base"]["unseen"] - scores["unseen"]),
        "forgetting": 1 - math.exp(known["base"]["own"] - scores["own"]),
    }


@torch.no_grad()
def nats(model: Model, held: Mapping[str, texts.Text], most: int) -> dict[str, float]:
    """Nats per token on each text."""
    found = {}
    for name, text in held.items():
        ids = texts.tokens(text, model.tokenizer, needed=64, vocabulary=model.config.vocab_size)[:most]
        losses, counts = window_losses(model.module, ids, texts.within(model.config, 512))
        found[name] = float(losses.sum() / counts.sum())
    model.forget()
    return found


def in_process(given: list[Any]) -> tuple[float, int]:
    """Seconds and peak resident bytes of a merge in a process of its own."""
    done = subprocess.run([sys.executable, "-c", WORK, json.dumps(given)], capture_output=True, text=True, env=os.environ, check=False)
    if done.returncode:
        raise SettingError(f"{given[0]} with {given[1]} failed: {done.stderr.strip().splitlines()[-1] if done.stderr else done.returncode}")
    seconds, peak = json.loads(done.stdout.strip().splitlines()[-1])
    return seconds, peak


def calibrated(method: Method, kinds: Kinds, work: Path) -> tuple[Method, str | None]:
    """The method with a text for each donor if it takes them, and the calibration text if it asks for some: all experts'.

    What is scored on is in neither.
    """
    files = []
    for name, source in kinds.experts.items():
        files.append(work / f"{name}.txt")
        if not files[-1].exists():
            files[-1].write_text("\n\n".join(texts.read(source).split(0.1)[0].documents), "utf-8")
    if hasattr(method, "texts"):
        return method.build(method.settings() | {"texts": [str(file) for file in files]}), None
    if "calibration" not in method.needs():
        return method, None
    mixed = work / "mixed"
    if not mixed.exists():
        mixed.mkdir()
        for file in files:
            (mixed / file.name).write_text(file.read_text("utf-8")[:CHARACTERS], "utf-8")
    return method, str(mixed)


def every_method(donors: int, **settings: Mapping[str, Any]) -> dict[str, Method]:
    """Each method of the merge family that makes a model like the base of that many donors.

    settings: those that differ from the defaults, under the method's last name.
    """
    from .core.find import names

    found = {}
    for name in names():
        short, cls = name.removeprefix("merge."), find(name)
        if not name.startswith("merge.") or short in OTHERS or "donors" not in cls.needs():
            continue
        least, most = cls.takes
        if least <= donors and (most is None or donors <= most):
            found[short] = cls.build(settings.get(short, {}))
    return found


# Interference


def interference(base: str | Path, experts: Mapping[str, str | Path], keep: float = 0.2) -> list[dict[str, float]]:
    """How the experts' changes get in each other's way, a row for each block.

    `conflicts`: of the entries that at least two experts changed most (the `keep` largest of each tensor), the fraction
    where their signs differ. `alike`: the mean cosine between two experts' changes of one tensor.
    """
    start, ends = Checkpoint(base), [Checkpoint(folder) for folder in experts.values()]
    anatomy = anatomy_of(start.config)
    sums: dict[int, list[float]] = {}
    for name in start.names:
        _, depth = anatomy.role(name) or ("", None)
        if depth is None or len(start.shape(name)) < 2:
            continue
        changes = torch.stack([(end.read(name).float() - start.read(name).float()).flatten() for end in ends])
        signs = torch.stack([trimmed(change.__getitem__, change.numel(), keep)(slice(0, change.numel())).sign() for change in changes])
        shared = signs.abs().sum(0) >= 2
        unit = torch.nn.functional.normalize(changes, dim=1)
        cosine = (unit @ unit.T).triu(1).sum() / (len(ends) * (len(ends) - 1) / 2)
        found = sums.setdefault(depth, [0.0, 0.0, 0.0, 0.0])
        found[0] += float((shared & (signs.sum(0).abs() < signs.abs().sum(0))).sum())
        found[1] += float(shared.sum())
        found[2] += float(cosine)
        found[3] += 1
    return [{"block": depth, "conflicts": a / b if b else 0.0, "alike": c / d} for depth, (a, b, c, d) in sorted(sums.items())]


def interference_plot(rows: list[dict[str, float]]) -> str:
    """Conflicts and likeness by block. SVG."""
    figure, axes = report.figure_of(7.2, 3.2)
    blocks = [row["block"] for row in rows]
    axes.bar(blocks, [row["conflicts"] for row in rows], color=report.SOFT, width=0.6, label="signs differ, of shared large changes")
    axes.plot(blocks, [row["alike"] for row in rows], color=report.WARM, marker="o", label="cosine of two experts' changes")
    axes.set_xlabel("block")
    axes.set_xticks(blocks)
    axes.set_ylim(min(0, *(row["alike"] for row in rows)), 1)
    axes.legend(frameon=False, fontsize=9)
    return report.svg_of(figure)


def merges_plot(rows: list[dict[str, Any]]) -> str:
    """Held-in against held-out score of every merge, the base beside them. SVG."""
    figure, axes = report.figure_of(7.2, 4.6)
    for row in rows:
        merged = "seconds" in row
        if merged or row["model"] == "base":
            axes.scatter(
                [row["held-out"]], [row["held-in"]], color=report.ACCENT if merged else report.INK, marker="o" if merged else "s", s=30
            )
            axes.annotate(f" {row['model']}", (row["held-out"], row["held-in"]), fontsize=8, color=report.INK)
    axes.set_xlabel("held-out: score on unseen text over the base's")
    axes.set_ylabel("held-in: mean score over each expert's")
    return report.svg_of(figure)


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Modelwright: merges compared</title><style>{{ style }}</style></head><body>
<h1>{{ rows|length }} models on {{ kinds }} kinds of text</h1>
<p class="lead">A score is a likelihood per token, shown over that of the expert (held-in) or of the base (held-out, forgetting).</p>
<div class="wide"><table><tr>{% for column in columns %}<th>{{ column }}</th>{% endfor %}</tr>
{% for row in rows %}<tr>{% for column in columns %}<td>{{ shown(row.get(column)) }}</td>{% endfor %}</tr>{% endfor %}</table></div>
<h2>Held-in against held-out</h2>{{ merges }}
<h2>Interference by block</h2>{{ interference }}
<p class="lead">Made by Modelwright {{ version }}.</p></body></html>
"""


def page(rows: list[dict[str, Any]], conflicts: list[dict[str, float]]) -> str:
    """The comparison as one self-contained HTML file."""
    import jinja2
    from markupsafe import Markup

    columns = list(dict.fromkeys(key for row in rows for key in row))

    def shown(value: Any) -> str:
        return "" if value is None else f"{value:.3f}" if isinstance(value, float) else str(value)

    return jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(PAGE).render(
        rows=rows, columns=columns, kinds=len(columns) - 6 + 2, shown=shown, style=Markup(report.STYLE), version=__version__,
        merges=Markup(merges_plot(rows)), interference=Markup(interference_plot(conflicts)),
    )  # fmt: skip

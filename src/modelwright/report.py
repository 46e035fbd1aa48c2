"""What a fit or a run shows: an HTML page that needs no other file, plots, tables, and the model card."""

from __future__ import annotations

import io
import json
import math
import textwrap
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
from rich import box
from rich.table import Table
from rich.text import Text

from . import __version__
from .anatomy import anatomy_of
from .blocks._stored import Stored
from .core import find, loading
from .core.evaluate import GROUPS
from .core.method import LayerAdapter
from .core.model import Model, unwrapped

INK, ACCENT, SOFT, WARM = "#1f2933", "#0b6e99", "#9fb3c8", "#c2410c"
PARTS = ("attn", "mlp")
COLUMNS = {
    "model": "model",
    "step": "step",
    "parameters": "parameters",
    "zeros": "zeros",
    "bytes_disk": "on disk",
    "bytes_memory": "in memory",
    "bits_per_weight": "bits per weight",
    "flops_per_token": "FLOPs per token",
    "perplexity": "perplexity",
    "bits_per_byte": "bits per byte",
    "questions_right": "questions right",
    "divergence": "nats from the original",
    "flips": "other likeliest token",
    "truths_right": "truths right",
    "stereotypes_likelier": "stereotype likelier",
    "tokens": "tokens measured",
    "prefill_tokens_per_second": "prefill tokens/s",
    "decode_tokens_per_second": "decode tokens/s",
    "joules_per_token": "joules per token",
    "peak_memory": "peak memory",
    "peak_bytes": "peak memory",
    "seconds": "seconds",
}


@dataclass
class Page:
    """Everything that the report of a fit shows."""

    name: str
    budget: str
    budget_bytes: int
    table: list[dict[str, Any]]  # the original and the chosen model
    frontier: list[dict[str, Any]]  # every trial
    chosen: dict[str, Any]
    sensitivity: dict[str, dict[str, float]]
    samples: list[tuple[str, str, str]]  # prompt, what the original writes, what the chosen one writes
    recipe: str
    account: list[dict[str, Any]]
    score: float  # of the original on the text that trials were scored on, in nats per token
    recovered: float  # of the chosen model after recovery, on the same
    bits: list[dict[str, Any]] = field(default_factory=list)  # of the chosen model, as `bits_by_matrix` gives them
    notes: list[str] = field(default_factory=list)


# Numbers in words


def size(count: float | None) -> str:
    """Bytes as "2.2 MB"."""
    if count is None:
        return "unknown"
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} B" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def short(count: float) -> str:
    """A count as "2.83 M"."""
    for unit in ("", " k", " M", " G"):
        if abs(count) < 1000:
            return f"{count:.3g}{unit}"
        count /= 1000
    return f"{count:.3g} T"


def shown(column: str, row: dict[str, Any]) -> str:
    """A value of a table as text."""
    value = row.get(column)
    if value is None:
        return "unknown" if column == "joules_per_token" else "–"
    if column in ("bytes_disk", "bytes_memory", "peak_memory", "peak_bytes"):
        return size(value)
    if column == "perplexity":
        low, high = row["perplexity_low"], row["perplexity_high"]
        return f"{value:.2f} (one window)" if low is None else f"{value:.2f} ({low:.2f}–{high:.2f})"
    if column in ("parameters", "zeros", "flops_per_token", "tokens"):
        return short(value)
    if column.endswith("_per_second"):
        return f"{value:,.0f}"
    if column == "bits_per_byte":
        return f"{value:.3f}"
    return (f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}") if isinstance(value, float) else str(value)


def columns_of(rows: list[dict[str, Any]]) -> list[str]:
    """The columns that some row has, in the usual order."""
    return [column for column in COLUMNS if any(column in row for row in rows)]


def plain_table(title: str = "") -> Table:
    """An empty table for the terminal, narrow enough for 80 columns."""
    return Table(title=title or None, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)


def heading(text: str) -> str:
    """A column's name on several lines, so that the column is no wider than what stands in it."""
    return textwrap.fill(text, 10, break_long_words=False)


def measured_on(rows: list[dict[str, Any]]) -> str:
    """The text that quality was measured on, as "all of my.txt"; "" where none was."""
    return " and ".join(dict.fromkeys(row["text"] for row in rows if "text" in row))


def table(rows: list[dict[str, Any]], title: str = "") -> Table:
    """Rows as a table for the terminal: models side by side, with the text that they were measured on; steps one below the other."""
    made = plain_table(title)
    if text := measured_on(rows):
        made.caption, made.caption_justify = Text(f"Measured on {text}."), "left"
    columns = columns_of(rows)
    if "step" in columns:
        columns = [column for column in columns if column not in ("bytes_memory", "flops_per_token")]  # they stay in the account
    if rows and "model" in rows[0]:
        made.add_column("")
        for row in rows:
            made.add_column(Text(str(row["model"])), justify="right", overflow="fold")
        for column in columns[1:]:
            made.add_row(COLUMNS[column], *(shown(column, row) for row in rows))
        return made
    for column in columns:
        made.add_column(heading(COLUMNS[column]), justify="left" if column == "step" else "right", no_wrap=column == "step")
    for row in rows:
        made.add_row(*(shown(column, row) for column in columns))
    return made


# Plots


def best_of(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows that no other row beats in both bytes and score, from small to large."""
    found: list[dict[str, Any]] = []
    for row in sorted(rows, key=lambda row: (row["bytes"], row["nats_per_token"])):
        if not found or row["nats_per_token"] < found[-1]["nats_per_token"]:
            found.append(row)
    return found


def frontier_plot(page: Page) -> str:
    """Size against quality: the original, every trial, the chosen one, the budget. SVG."""
    figure, axes = figure_of(7.2, 4.2)
    original = page.table[0]["bytes_disk"]
    worst = page.score + 3.0
    trials = [row for row in page.frontier if row["nats_per_token"] < worst]
    left_out = len(page.frontier) - len(trials)
    axes.scatter(
        [row["bytes"] / 1e6 for row in trials], [row["nats_per_token"] for row in trials], s=26, color=SOFT, label="trials", zorder=2
    )
    front = best_of(trials)
    axes.step([row["bytes"] / 1e6 for row in front], [row["nats_per_token"] for row in front], where="post", color=ACCENT, lw=1.4,
              label="frontier", zorder=3)  # fmt: skip
    axes.scatter([original / 1e6], [page.score], marker="s", s=52, color=INK, label="original", zorder=4)
    axes.scatter([page.chosen["bytes"] / 1e6], [page.chosen["nats_per_token"]], marker="*", s=190, color=WARM, label="chosen", zorder=5)
    axes.scatter([page.table[1]["bytes_disk"] / 1e6], [page.recovered], marker="*", s=190, facecolors="white", edgecolors=WARM,
                 label="chosen, recovered", zorder=6)  # fmt: skip
    axes.axvline(page.budget_bytes / 1e6, color=WARM, lw=1, ls="--")
    axes.annotate(
        f" budget {page.budget}", (page.budget_bytes / 1e6, 1), xycoords=("data", "axes fraction"), va="top", color=WARM, fontsize=9
    )
    axes.set_xlabel("weight files, MB")
    axes.set_ylabel("nats per token on calibration text")
    axes.set_xlim(left=0)
    if left_out:
        axes.annotate(f"{left_out} trials lie above", (0.99, 0.99), xycoords="axes fraction", ha="right", va="top", color=SOFT, fontsize=8)
    axes.legend(frameon=False, fontsize=9, loc="upper right", bbox_to_anchor=(1, 0.93))
    return svg_of(figure)


def sensitivity_plot(page: Page) -> str:
    """How much each block minds rounding, low rank, zeros and removal. SVG."""
    depths = sorted({int(place.split()[1]) for place in page.sensitivity})
    figure, all_axes = figure_of(7.2, 4.6, 2, 2)
    titles = {
        "bits": "rounded to 3 bits",
        "rank": "half the rank's parameters",
        "zeros": "half the weights zero",
        "removed": "block removed",
    }
    for axes, (name, title) in zip(all_axes.flat, titles.items(), strict=True):
        if name == "removed":
            axes.bar(depths, [page.sensitivity.get(f"block {depth}", {}).get(name, 0) for depth in depths], color=INK, width=0.6)
        else:
            for shift, (part, colour) in enumerate(zip(PARTS, (ACCENT, WARM), strict=True)):
                heights = [page.sensitivity.get(f"block {depth} {part}", {}).get(name, 0) for depth in depths]
                axes.bar([depth + 0.4 * shift - 0.2 for depth in depths], heights, width=0.4, color=colour, label=part)
        axes.set_title(title, fontsize=10, loc="left")
        axes.set_xticks(depths if len(depths) <= 16 else depths[:: len(depths) // 8])
    all_axes[0, 0].legend(frameon=False, fontsize=8)
    figure.supxlabel("block", fontsize=10)
    figure.supylabel("nats per token lost", fontsize=10)
    return svg_of(figure)


def bits_by_matrix(model: Model) -> list[dict[str, Any]]:
    """The width of each matrix's codes: rows of role, block (None outside the blocks), bits, and harm where `quantize.mixed` measured it.

    harm: by the bits that the matrix alone was rounded to, nats a token. No weight is read.
    """
    if model.dense:
        return []
    module = unwrapped(model.skeleton())
    anatomy = anatomy_of(module)
    measured = {row["matrix"]: row["harm"] for step in model.history for row in step.get("details", []) if isinstance(row, dict)}
    rows = []
    for path, layer in module.named_modules():
        bits, place = getattr(layer, "bits", None), anatomy.role(f"{path}.weight")
        if isinstance(layer, Stored) and isinstance(bits, int) and place is not None:
            harm = {int(key): value for key, value in measured.get(f"{path}.weight", {}).items()}
            rows.append({"role": place[0], "block": place[1], "bits": bits, "harm": harm})
    return rows


def uneven(rows: list[dict[str, Any]]) -> bool:
    """Whether matrices have codes of different widths, so that there is something to see."""
    return len({row["bits"] for row in rows}) > 1


def bits_plot(rows: list[dict[str, Any]]) -> str:
    """The bits of each matrix by role and block, and what rounding it alone to the fewest bits costs where that was measured. SVG."""
    from matplotlib.colors import LinearSegmentedColormap, LogNorm

    roles = list(dict.fromkeys(row["role"] for row in rows))
    inside = sorted({row["block"] for row in rows if row["block"] is not None})
    blocks = inside + [None] * any(row["block"] is None for row in rows)
    fewest = min((min(row["harm"]) for row in rows if row["harm"]), default=0)
    panels: list[tuple[str, Callable[[dict[str, Any]], float | None]]] = [("bits", lambda row: row["bits"])]
    if any(0 < (row["harm"].get(fewest) or 0) < math.inf for row in rows):
        panels.append((f"harm of rounding it alone to {fewest} bits, nats per token", lambda row: _drawn(row["harm"].get(fewest))))
    width = min(12.0, max(5.0, 2.2 + 0.42 * len(blocks)))
    figure, axes = figure_of(width, (0.7 + 0.27 * len(roles)) * len(panels) + 0.3, len(panels))
    for place, (panel, (title, value)) in enumerate(zip([axes] if len(panels) == 1 else axes, panels, strict=True)):
        table = [[_mean([found for row in rows if (row["role"], row["block"]) == (role, block) and (found := value(row)) is not None])
                  for block in blocks] for role in roles]  # fmt: skip
        known = [cell for line in table for cell in line if cell == cell]
        norm = LogNorm(min(known), max(max(known), 1.01 * min(known))) if place else None
        shades = LinearSegmentedColormap.from_list("shades", ["#e4ecf2", WARM if place else ACCENT])
        drawn = panel.pcolormesh(range(len(blocks) + 1), range(len(roles) + 1), table, cmap=shades, norm=norm, edgecolors="white", lw=1.5)
        if not place and len(blocks) <= 24:
            middle = (min(known) + max(known)) / 2
            for line, cells in enumerate(table):
                for column, cell in enumerate(cells):
                    if cell == cell:
                        panel.text(column + 0.5, line + 0.5, f"{cell:.3g}", ha="center", va="center", fontsize=8,
                                   color="white" if cell > middle else INK)  # fmt: skip
        if place:
            scale = figure.colorbar(drawn, ax=panel, pad=0.01, aspect=12)
            scale.outline.set_visible(False)
            scale.ax.tick_params(labelsize=8)
        panel.invert_yaxis()
        panel.set_yticks([number + 0.5 for number in range(len(roles))], roles, fontsize=8)
        ticks = range(0, len(blocks), 1 if len(blocks) <= 24 else len(blocks) // 12)
        names = ["outside" if block is None else str(block) for block in blocks]
        panel.set_xticks([tick + 0.5 for tick in ticks], [names[tick] for tick in ticks], fontsize=8)
        panel.tick_params(length=0)
        panel.spines[:].set_visible(False)
        panel.set_title(title, fontsize=10, loc="left")
        panel.set_xlabel("block", fontsize=9)
    return svg_of(figure)


def _drawn(harm: float | None) -> float | None:
    """What a logarithmic scale can show of a harm: rounding alone may leave less than nothing, and an overflow leaves infinity."""
    return harm if harm is not None and 0 < harm < math.inf else None


def _mean(values: list[float]) -> float:
    """NaN of none, which is drawn as nothing."""
    return sum(values) / len(values) if values else math.nan


def figure_of(width: float, height: float, rows: int = 1, columns: int = 1) -> tuple[Any, Any]:
    """A figure of so many inches in the reports' style, and its axes."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(
        {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": SOFT, "svg.hashsalt": "modelwright"}
    ):
        figure = Figure(figsize=(width, height), layout="constrained")
        return figure, figure.subplots(rows, columns, squeeze=True)


def svg_of(figure: Any) -> str:
    """A figure as SVG to stand inside HTML."""
    stream = io.StringIO()
    figure.savefig(stream, format="svg", metadata={"Date": None})
    return stream.getvalue()[stream.getvalue().index("<svg") :]


# Pages

STYLE = """ body { font: 16px/1.5 system-ui, sans-serif; color: #1f2933; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
 h1 { font-size: 1.6rem; margin-bottom: .2rem } h2 { font-size: 1.15rem; margin-top: 2.2rem }
 .lead { color: #52606d } svg { max-width: 100%; height: auto }
 table { border-collapse: collapse; font-size: .92rem } td, th { padding: .3rem .8rem; border-bottom: 1px solid #e4e7eb; text-align: right }
 td:first-child, th:first-child { text-align: left } .wide { overflow-x: auto }
 pre { background: #f5f7fa; padding: .8rem 1rem; overflow-x: auto; font-size: .86rem } details summary { cursor: pointer; color: #0b6e99 }
 .prompt { color: #829ab1 } .pair { display: grid; grid-template-columns: 1fr 1fr; gap: 1rem; margin-bottom: 1rem }
 .pair div { background: #f5f7fa; padding: .6rem .8rem; font-size: .9rem; white-space: pre-wrap; overflow-wrap: anywhere }"""

TEMPLATE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Modelwright: {{ page.name }} within {{ page.budget }}</title>
<style>
{{ style }}</style></head><body>
<h1>{{ page.name }} within {{ page.budget }}</h1>
<p class="lead">{{ lead }}</p>
<h2>Before and after, on text that nothing has seen</h2>
<div class="wide"><table><tr><th></th>{% for row in page.table %}<th>{{ row.model }}</th>{% endfor %}</tr>
{% for column in columns[1:] %}<tr><td>{{ names[column] }}</td>{% for row in page.table %}<td>{{ shown(column, row) }}</td>{% endfor %}</tr>
{% endfor %}</table></div>
<p class="lead">Perplexity with its 95 % interval over windows of text. Energy is unknown where the machine has no counter for it.</p>
<h2>Size against quality</h2>{{ frontier }}
<h2>What each block minds</h2>{{ sensitivity }}
{% if bits %}<h2>Bits of each matrix</h2>{{ bits }}
{% endif %}<h2>Continuations</h2>
{% for prompt, before, after in page.samples %}<div class="pair">
<div><b>original</b><br><span class="prompt">{{ prompt }}</span>{{ before[prompt|length:] }}</div>
<div><b>chosen</b><br><span class="prompt">{{ prompt }}</span>{{ after[prompt|length:] }}</div></div>{% endfor %}
<h2>The recipe</h2><pre>{{ page.recipe }}</pre>
<h2>What each step did</h2>
<div class="wide"><table><tr>{% for column in steps %}<th>{{ names[column] }}</th>{% endfor %}</tr>
{% for row in page.account %}<tr>{% for column in steps %}<td>{{ shown(column, row) }}</td>{% endfor %}</tr>{% endfor %}</table></div>
{% for row in page.account %}{% for note in row.get("notes", []) %}<p class="lead">{{ row.step }}: {{ note }}</p>{% endfor %}{% endfor %}
<details><summary>All {{ page.frontier|length }} trials</summary><div class="wide"><table>
<tr><th>trial</th><th>bytes</th><th>nats per token</th><th>steps</th></tr>
{% for row in page.frontier|sort(attribute="bytes") %}<tr><td>{{ row.trial }}</td><td>{{ size(row.bytes) }}</td>
<td>{{ "%.4f"|format(row.nats_per_token) }}</td>
<td>{{ row.steps }}</td></tr>{% endfor %}</table></div></details>
<p class="lead">Made by Modelwright {{ version }}.</p>
</body></html>
"""


def lead(page: Page) -> str:
    """The result in one or two sentences."""
    before, after = page.table
    return (
        f"{size(before['bytes_disk'])} became {size(after['bytes_disk'])}, "
        f"{after['bytes_disk'] / before['bytes_disk']:.0%} of the weight files. "
        f"Perplexity on held-out text went from {before['perplexity']:.2f} to {after['perplexity']:.2f}, "
        f"bits per byte from {before['bits_per_byte']:.3f} to {after['bits_per_byte']:.3f}. Measured on {measured_on(page.table)}."
    )


def html(page: Page) -> str:
    """The report as one self-contained HTML file."""
    from markupsafe import Markup

    made = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(TEMPLATE)
    steps = [column for column in columns_of(page.account) if column not in ("flops_per_token",)]
    return made.render(
        page=page, lead=lead(page), columns=columns_of(page.table), steps=steps, names=COLUMNS, shown=shown, size=size, version=__version__,
        bits=Markup(bits_plot(page.bits)) if uneven(page.bits) else "",
        frontier=Markup(frontier_plot(page)), sensitivity=Markup(sensitivity_plot(page)), style=Markup(STYLE),
    )  # fmt: skip


GROUPED = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Modelwright: what quantising cost {{ rows[0].model }}</title><style>
{{ style }}</style></head><body>
<h1>What quantising cost {{ rows[0].model }}</h1>
<p class="lead">The first model is the original, which the others are compared with. Measured on {{ text }}.</p>
<div class="wide"><table><tr><th></th>{% for row in rows %}<th>{{ row.model }}</th>{% endfor %}</tr>
{% for group, columns in groups.items() %}<tr><th colspan="{{ rows|length + 1 }}">{{ group }}</th></tr>
{% for column in columns %}<tr><td>{{ names[column] }}</td>{% for row in rows %}<td>{{ shown(column, row) }}</td>{% endfor %}</tr>
{% endfor %}{% endfor %}</table></div>
<p class="lead">Perplexity with its 95 % interval over windows. Nats from the original: mean KL(original ‖ model) of a token's
prediction; below it the share of tokens for which another one has become the likeliest. Questions and truths: the share whose answer is
the likeliest choice, by byte. Stereotype likelier: of pairs of texts, the share whose stereotype the model finds likelier; 0.5 is
even-handed.</p>
<p class="lead">Made by Modelwright {{ version }}.</p></body></html>
"""


def grouped(rows: list[dict[str, Any]]) -> dict[str, list[str]]:
    """The columns of `core.evaluate.GROUPS` that some row has; a group without any is left out."""
    found = {group: [column for column in columns if any(column in row for row in rows)] for group, columns in GROUPS.items()}
    return {group: columns for group, columns in found.items() if columns}


def grouped_html(rows: list[dict[str, Any]]) -> str:
    """A comparison by `measure` with the preset quantization as one self-contained HTML file: a table in three groups."""
    from markupsafe import Markup

    made = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(GROUPED)
    return made.render(
        rows=rows, groups=grouped(rows), names=COLUMNS, shown=shown, text=measured_on(rows), style=Markup(STYLE), version=__version__
    )


LOADS = {
    "dense": "It loads with plain transformers.",
    "compressed-tensors": "It is a compressed-tensors checkpoint and loads with plain transformers (`pip install compressed-tensors`).",
    "adapter": "It is an adapter beside its base model, and loads with peft.",
    "own adapter": "It is an adapter beside its base model, and loads with peft after `import modelwright`, which brings its type along.",
    loading.METHOD: "It loads with transformers after `import modelwright`: some of its layers have forms or sizes that no config can say. "
    "**Without that import transformers makes another model of it, or none: it warns of tensors that it does not know or misses, "
    "leaves out the one and fills the other with random numbers, and refuses sizes that differ.**",
}


ADAPTERS = ("adapter", "own adapter")


def how_to_load(form: str, folder: str, architecture: str = "ForCausalLM") -> str:
    """The lines of Python that load a model of one of the forms `LOADS`, and a sentence about it."""
    auto = "AutoModelForCausalLM" if architecture.endswith(("ForCausalLM", "LMHeadModel")) else "AutoModel"
    first, package, also = "import modelwright\n" if form in (loading.METHOD, "own adapter") else "", "transformers", ", AutoTokenizer"
    if form in ADAPTERS:
        first, auto, package, also = f"{first}from transformers import AutoTokenizer\n", "AutoPeftModelForCausalLM", "peft", ""
    return f"""```python
{first}from {package} import {auto}{also}

model = {auto}.from_pretrained("{folder}")
tokenizer = AutoTokenizer.from_pretrained("{folder}")
```

{LOADS[form]}"""


def card(page: Page, model: Model) -> str:
    """The model card of a fit, as README.md beside the weights."""
    descriptions = loading.described(model.module)
    stated = loading.quantization_config(model.module) or {"quant_method": "dense"}
    before, after = page.table
    rows = "\n".join(f"| {COLUMNS[column]} | {shown(column, before)} | {shown(column, after)} |" for column in columns_of(page.table)[1:])
    forms = {text["kind"].replace("_", " ") for text in descriptions.values()} | ({"shared"} if "ties" in stated else set())
    kinds = ", ".join(sorted(forms)) or "dense"
    return f"""---
library_name: transformers
tags: [modelwright, compressed]
base_model: {page.name}
---

# {page.name} within {page.budget}

{lead(page)} Layers are stored as: {kinds}.

{how_to_load(stated["quant_method"], "model/")}

| | original | this model |
|---|---|---|
{rows}

Made by Modelwright {__version__} with this recipe:

```yaml
{page.recipe}```
"""


COMPARED = {
    "method": "method", "score": "", "trained": "trained", "rate": "learning rate", "optimizer_bytes": "optimizer",
    "step_bytes": "a step holds", "step_seconds": "ms a step", "merges": "merges",
}  # fmt: skip


def compared(row: dict[str, Any]) -> list[str]:
    """A row of a comparison as text, in the order of `COMPARED`."""
    if "why not" in row:
        return [row["method"], "–", *[""] * (len(COMPARED) - 2)]
    percent = row["column"] == "right"
    score = f"{row['score']:.1%}" if percent else f"{row['score']:.2f}"
    if (spread := row.get("spread")) is not None:
        score += f" ± {100 * spread:.1f}" if percent else f" ± {spread:.2f}"
    if "rate" not in row:
        return [row["method"], score, *[""] * (len(COMPARED) - 2)]
    settings = ", ".join(f"{key} {value:.3g}" if isinstance(value, float) else f"{key} {value}" for key, value in row["settings"].items())
    return [
        f"{row['method']} ({settings})" if settings else row["method"], score, f"{row['trained']:,}", f"{row['rate']:g}",
        size(row["optimizer_bytes"]), size(row["step_bytes"]), f"{1000 * row['step_seconds']:.0f}",
        {"yes": "yes", "": ""}.get(row["merges"], "no"),
    ]  # fmt: skip


def ranked(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The rows of a comparison by task, the best first, and last those that came to nothing."""
    tasks: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        tasks.setdefault(row["task"], []).append(row)
    sign = lambda row: -row["score"] if row["column"] == "right" else row["score"]  # noqa: E731
    return {
        name: [*sorted((row for row in own if "score" in row), key=sign), *(row for row in own if "score" not in row)]
        for name, own in tasks.items()
    }


def comparison_tables(rows: list[dict[str, Any]]) -> list[Table]:
    """A table for the terminal for each task, without what its width has no place for."""
    made = []
    left_out = ("optimizer_bytes", "step_bytes", "step_seconds")
    for name, own in ranked(rows).items():
        shown_as = plain_table(name)
        column = next((row["column"] for row in own if "column" in row), "score")
        shown = [place for place, key in enumerate(COMPARED) if key not in left_out]
        for key in (key for key in COMPARED if key not in left_out):
            shown_as.add_column(COMPARED[key] or column, justify="left" if key in ("method", "merges") else "right")
        for row in own:
            shown_as.add_row(*(Text(compared(row)[place]) for place in shown))
        made.append(shown_as)
    return made


def comparison_page(rows: list[dict[str, Any]], asked: Any) -> str:
    """A comparison as Markdown: what was asked, a plot and a table for each task."""
    budget, seeds, rates = asked.parameters, ", ".join(map(str, asked.seeds)), ", ".join(f"{rate:g}" for rate in asked.rates)
    parts = [
        f"""# Adapters compared

Every adapter trains at most {budget} of a model's numbers on {asked.tokens:,} tokens, or as many examples, with the seeds {seeds}; of the
learning rates {rates} each has the one that did best on a part of the training data. Scores are of data that no run has seen, ± half of a
95 % interval over the seeds. A new head, where there is one, trains in all rows and is not counted. `optimizer` is what its states
take; `a step holds` is that, gradients, and what the forward pass keeps for them, beyond the model and its adapter.

![Scores](comparison.svg)
"""
    ]
    for name, own in ranked(rows).items():
        column = next((row["column"] for row in own if "column" in row), "score")
        task = asked.tasks[name]
        heads = [title or column for title in COMPARED.values()]
        lines = [f"| {' | '.join(heads)} |", f"|{' --- |' * len(heads)}"]
        lines += [f"| {' | '.join(cell.replace('|', '/') for cell in compared(row))} |" for row in own]
        whys = "".join(f"- {row['method']} has no row: {row['why not']}\n" for row in own if "why not" in row)
        whys += "".join(
            f"- {row['method']} stays beside the weights: {row['merges']}\n" for row in own if row.get("merges", "yes") not in ("yes", "")
        )
        parts.append(f"## {name}: {task['model']} on {task['data']}\n\n" + "\n".join(lines) + f"\n\n{whys}")
    return "\n".join(parts) + f"\nMade by Modelwright {__version__}. `comparison.json` has every score.\n"


def comparison_plot(rows: list[dict[str, Any]]) -> str:
    """The score of each method on each task with its interval, the best on top; SVG."""
    if any("curve" in row for row in rows):
        return _curves_plot([row for row in rows if "curve" in row and "score" in row])
    tasks = {name: [row for row in own if "score" in row] for name, own in ranked(rows).items()}
    tallest = max(map(len, tasks.values()))
    figure, _ = figure_of(5.2 * len(tasks), 1.2 + 0.22 * tallest)
    figure.clear()
    for place, (name, own) in enumerate(tasks.items(), 1):
        axes = figure.add_subplot(1, len(tasks), place)
        heights = range(len(own), 0, -1)
        beside = [row["method"] in ("nothing", "all weights") for row in own]
        for height, row, apart in zip(heights, own, beside, strict=True):
            axes.errorbar(row["score"], height, xerr=row.get("spread") or 0, fmt="s" if apart else "o", ms=4, lw=1,
                          color=INK if apart else ACCENT)  # fmt: skip
        axes.set_yticks(list(heights), [row["method"] for row in own], fontsize=8)
        axes.set_ylim(0.3, tallest + 0.7)
        axes.set_title(name, fontsize=10, loc="left")
        axes.set_xlabel("share right" if own and own[0]["column"] == "right" else "perplexity")
        axes.grid(axis="x", lw=0.4, color="0.85")
        ends = [row["score"] for row, apart in zip(own, beside, strict=True) if apart]
        if len(ends) > 1 and own[0]["column"] != "right":  # what is far worse than nothing would leave no room to tell the others apart
            span = max(ends) - min(ends)
            most = max(ends) + 0.1 * span
            axes.set_xlim(min(row["score"] for row in own) - 0.1 * span, most)
            for height, row in zip(heights, own, strict=True):
                if row["score"] > most:
                    axes.annotate(f"{row['score']:.3g} →", (most, height), ha="right", va="center", fontsize=8, color=ACCENT)
    return svg_of(figure)


def _curves_plot(rows: list[dict[str, Any]]) -> str:
    """The score of each method against the number of examples that it learnt from, a panel for each task; SVG."""
    names = list(dict.fromkeys(row["curve"] for row in rows))
    figure, _ = figure_of(5.6 * len(names), 4.2)
    figure.clear()
    for place, name in enumerate(names, 1):
        axes = figure.add_subplot(1, len(names), place)
        own = [row for row in rows if row["curve"] == name]
        for number, method in enumerate(dict.fromkeys(row["method"] for row in own)):
            points = sorted((row["examples"], row["score"], row.get("spread") or 0) for row in own if row["method"] == method)
            counts, scores, spreads = zip(*points, strict=True)
            axes.errorbar(
                counts, scores, yerr=spreads, marker="osD^v"[number % 5], ms=4, lw=1, capsize=2, color=f"C{number % 10}", label=method
            )
        axes.set_xscale("log")
        axes.set_xlabel("examples")
        axes.set_ylabel("share right")
        axes.set_title(name, fontsize=10, loc="left")
        axes.legend(frameon=False, fontsize=8)
    return svg_of(figure)


BITS = "bits.svg"  # beside a run's weights
PICTURE = f"![Bits of each matrix]({BITS})\n\n"


def _top(name: Any, what: str, folder: Path) -> str:
    """How the card of what lies in `folder` begins, and how that loads; no weight is read."""
    file = folder / "config.json"
    config = json.loads(file.read_text("utf-8")) if file.is_file() else {}
    form = (config.get("quantization_config") or {"quant_method": "dense"})["quant_method"]
    if (adapter := folder / "adapter_config.json").is_file():
        kind = json.loads(adapter.read_text("utf-8"))["peft_type"].lower()
        own = find.exists(f"adapt.{kind}") and issubclass(find.find(f"adapt.{kind}"), LayerAdapter)
        form = "own adapter" if own else "adapter"
    return f"""---
library_name: {"peft" if form in ADAPTERS else "transformers"}
tags: [modelwright]
base_model: {name}
---

# {name}{what}

{how_to_load(form, "./", next(iter(config.get("architectures") or ["ForCausalLM"])))}
"""


def saved_card(name: str, history: list[dict[str, Any]], folder: Path) -> str:
    """The model card of a model that is saved by itself, as README.md beside the weights in `folder`."""
    steps = ", ".join(step["method"] for step in history)
    notes = "".join(f"- {note}\n" for step in history for note in step.get("notes", ()))
    done = f"What was done: {steps}.\n\n" if steps else ""
    return f"""{_top(name, "", folder)}
{done}{notes}
`modelwright.json` has the settings of the steps. Made by Modelwright {__version__}.
"""


def run_card(name: Any, recipe: str, account: list[dict[str, Any]], folder: Path) -> str:
    """The model card of a run, as README.md beside the weights in `folder`; no weight is read."""
    name = name if isinstance(name, str) else f"new {name['new']}"
    columns = ("parameters", "zeros", "bytes_disk", "bits_per_weight", "flops_per_token")
    rows = "\n".join(f"| {COLUMNS[column]} | {shown(column, account[0])} | {shown(column, account[-1])} |" for column in columns)
    return f"""{_top(name, ", after " + ", ".join(row["step"] for row in account[1:]), folder)}
| | original | this model |
|---|---|---|
{rows}

{PICTURE * (folder / BITS).is_file()}`account.json` has the same after every step. Made by Modelwright {__version__} with this recipe:

```yaml
{recipe}```
"""

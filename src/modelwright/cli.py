"""The command line: few verbs, no flags of single methods; `--set steps.0.bits=3` changes anything in a recipe."""

from __future__ import annotations

import contextlib
import json
import sys
import textwrap
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from typer.core import TyperGroup

from . import __version__
from .core.errors import ModelwrightError


class Verbs(TyperGroup):
    """The verbs; an interrupt says what it leaves, and is exit code 130."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            goes_on = ctx.invoked_subcommand in ("run", "apply", "fit")
            rest = "the same command goes on from here" if goes_on else "nothing was written"
            Console(stderr=True).print(f"interrupted; {rest}")
            raise SystemExit(130) from None


app = typer.Typer(
    cls=Verbs,
    help="Give it a model and a budget; get back the best model that fits, with a measured account of what was paid.",
    no_args_is_help=True, add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False,
)  # fmt: skip
out = Console(highlight=False, emoji=False)

Quiet = Annotated[bool, typer.Option("--quiet", help="No progress.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Set = Annotated[list[str] | None, typer.Option("--set", help="Change a recipe's value, such as steps.0.blocks=2. Repeatable.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is in the folder.")]
Data = Annotated[str, typer.Option(help="Text: .txt, .jsonl, .parquet, a folder, a hub data set, or corpus.")]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Let the model's folder run code of its own.")]


def _print_version(asked: bool) -> None:
    if asked:
        print(f"modelwright {__version__}")
        raise typer.Exit


@app.callback(help=app.info.help)
def start(
    version: Annotated[bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)] = False,
) -> None:
    """What stands before the verbs."""


def main() -> None:
    """Run the command line; a user's mistake is one message and exit code 2, an interrupt is exit code 130."""
    with _plain_errors():
        app()


@contextlib.contextmanager
def _plain_errors() -> Iterator[None]:
    try:
        yield
    except ModelwrightError as error:
        Console(stderr=True, highlight=False, emoji=False, soft_wrap=True).print(f"[red]error:[/] {_escape(str(error))}")
        raise SystemExit(2) from None
    except OSError as error:
        Console(stderr=True, highlight=False, emoji=False, soft_wrap=True).print(
            f"[red]error:[/] {_escape(f'{type(error).__name__}: {error}')}"
        )
        raise SystemExit(2) from None


def _escape(text: str) -> str:
    return text.replace("[", r"\[")


@app.command("list")
def list_(family: Annotated[str | None, typer.Argument(help="Only this family.")] = None, as_json: Json = False) -> None:
    """List the methods with a line each."""
    from .core import find

    pages = [find.page(name) for name in find.names() if family is None or name.split(".")[0] == family]
    if not pages:
        from .core.errors import MethodError, nearest

        known = sorted({name.split(".")[0] for name in find.names()})
        raise MethodError(f"There is no family {family!r}.{nearest(str(family), known)} Families are {', '.join(known)}.")
    if as_json:
        print(json.dumps([{"name": page.name, "summary": page.summary, "status": page.status} for page in pages], indent=2))
        return
    table = Table(box=None, pad_edge=False)
    for column in ("method", "what it does", "status"):
        table.add_column(column)
    for page in pages:
        table.add_row(page.name, _escape(page.summary), page.status)
    out.print(table)


@app.command()
def show(
    name: Annotated[str | None, typer.Argument(help="A method or a family.")] = None,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON Schema of recipes, for editors.")] = False,
) -> None:
    """Show what a method does, what it needs, and its settings."""
    from .core import find

    if name is not None and name in find.families():
        out.print(_escape(find.families()[name]), soft_wrap=True)
        return
    from .core import describe

    if name is not None:
        out.print(_escape(describe.page(name)), soft_wrap=True)
    elif schema:
        print(json.dumps(describe.schema(), indent=2))
    else:
        raise typer.BadParameter("name a method or a family, or pass --schema")


@app.command()
def plan(recipe: Path, set_: Set = None, as_json: Json = False) -> None:
    """Predict a recipe's cost, step by step; no weight is read."""
    _print_plan(recipe, set_ or [], as_json)


def _print_plan(recipe: Any, overrides: list[str], as_json: bool) -> None:
    import dataclasses

    from . import report
    from .core.plan import plan as planned

    found = planned(str(recipe), overrides=overrides)
    if as_json:
        print(json.dumps(dataclasses.asdict(found), indent=2))
        return
    table = report.plain_table()
    for column in ("step", "parameters", "zeros", "stored", "FLOPs per token", "peak memory", "time"):
        table.add_column(report.heading(column), justify="left" if column == "step" else "right", no_wrap=column in ("step", "time"))
    for row in found.rows:
        table.add_row(
            row.step, report.short(row.parameters), report.short(row.zeros), report.size(row.bytes), report.short(row.flops_per_token),
            report.size(row.peak_bytes) if row.peak_bytes else "–", row.time or "–",
        )  # fmt: skip
    out.print(table)
    for text in [*found.warnings, *(note for row in found.rows for note in row.notes)]:
        _note(text)


def _note(text: str) -> None:
    """A note, wrapped between words on a terminal and on one line elsewhere."""
    width = out.width if out.is_terminal else 1_000_000
    lines = textwrap.wrap(f"note: {text}", width, subsequent_indent="      ", break_long_words=False, break_on_hyphens=False)
    out.print(_escape("\n".join(lines)), soft_wrap=True)


@app.command()
def run(
    recipe: Path,
    set_: Set = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only check the recipe and predict its cost.")] = False,
    overwrite: Overwrite = False,
    keep_steps: Annotated[bool, typer.Option("--keep-steps", help="Keep the model of every step.")] = False,
    trust_remote_code: Trust = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Run a recipe. A run that was killed goes on from its last finished step or block."""
    from .core.recipe import parse

    if recipe.is_file() and isinstance(stated := parse(recipe), dict) and "compare" in stated:
        _compare(stated, set_ or [], dry_run=dry_run, overwrite=overwrite, quiet=quiet, as_json=as_json)
        return
    if dry_run:
        _print_plan(recipe, set_ or [], as_json)
        return
    ways = {"overwrite": overwrite, "keep_steps": keep_steps, "trust_remote_code": trust_remote_code}
    _run(str(recipe), quiet=quiet, as_json=as_json, overrides=set_ or [], **ways)


@app.command()
def apply(
    method: Annotated[str, typer.Argument(help="A method, such as quantize.gptq.")],
    model: Annotated[str, typer.Argument(help="A folder, a hub name, or starter.")],
    save: Annotated[str, typer.Argument(help="The result's folder.")],
    data: Annotated[str | None, typer.Option(help="Text to calibrate or train on, if the method needs some, or corpus.")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="Change a setting of the method, such as bits=3. Repeatable.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only check and predict the cost.")] = False,
    overwrite: Overwrite = False,
    trust_remote_code: Trust = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Apply one method to a model: a recipe of one step."""
    from .core.recipe import read

    stated = {"model": model, "steps": [{method: {}}], "save": save} | ({"data": data} if data else {})
    recipe = read(stated, [f"steps.0.{change}" for change in set_ or []])
    if dry_run:
        _print_plan(recipe.yaml(), [], as_json)
        return
    _run(recipe, quiet=quiet, as_json=as_json, overwrite=overwrite, trust_remote_code=trust_remote_code)


def _run(recipe: Any, quiet: bool, as_json: bool, **ways: Any) -> None:
    from . import report
    from .core.progress import silence
    from .core.recipe import run as run_recipe

    with silence(quiet):
        done = run_recipe(recipe, **ways)
    if as_json:
        print(json.dumps({"folder": str(done.model.folder), "account": done.account}, indent=2))
        return
    out.print(report.table(done.account))
    for row in done.account:
        for note in row.get("notes", []):
            _note(note)
    out.print(f"saved to {done.model.folder}", soft_wrap=True)


def _compare(stated: dict[str, Any], overrides: list[str], dry_run: bool, overwrite: bool, quiet: bool, as_json: bool) -> None:
    from . import report
    from .compare import compare, read, runs_of
    from .core.progress import silence
    from .core.recipe import override

    for change in overrides:
        override(stated, change)
    if dry_run:
        asked = read(stated)
        whole = f"{len(asked.methods)} adapters on {len(asked.tasks)} tasks: at most {runs_of(asked)} runs of {asked.tokens:,} tokens"
        out.print(f"{whole}, to {asked.save}", soft_wrap=True)
        return
    with silence(quiet):
        rows = compare(stated, overwrite=overwrite)
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    for table in report.comparison_tables(rows):
        out.print(table)
    out.print(f"saved to {stated['save']}; its README.md has the tables and a plot", soft_wrap=True)


@app.command()
def fit(
    model: Annotated[str, typer.Argument(help="A folder, a hub name, or starter.")] = "starter",
    budget: Annotated[str, typer.Option(help="The most that the weight files may take: 40%, 300MB, or 2x smaller.")] = "40%",
    data: Data = "corpus",
    save: Annotated[Path, typer.Option(help="The folder to write.")] = Path("small"),
    quick: Annotated[bool, typer.Option("--quick", help="A short search.")] = False,
    trials: Annotated[int | None, typer.Option(min=1, help="How many recipes to try.")] = None,
    tokens: Annotated[int | None, typer.Option(min=64, help="Calibration tokens of a trial; the rest of the work follows.")] = None,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    overwrite: Overwrite = False,
    trust_remote_code: Trust = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Find the best model within a budget, and write a report."""
    from . import report
    from .core.progress import silence
    from .fit import fit as fitted

    with silence(quiet):
        found = fitted(
            model, budget=budget, data=data, save=save, quick=quick, trials=trials, tokens=tokens, seed=seed, overwrite=overwrite,
            trust_remote_code=trust_remote_code,
        )  # fmt: skip
    if as_json:
        print(json.dumps({"folder": str(found.folder), "table": found.table, "frontier": found.frontier}, indent=2))
        return
    out.print(report.table(found.table, "On held-out text"))
    out.print(f"saved to {found.folder}/model; open {found.folder}/report.html for the frontier")


@app.command()
def measure(
    models: Annotated[list[str], typer.Argument(help="Folders, hub names, or starter.")],
    data: Data = "corpus",
    tasks: Annotated[str, typer.Option(help="lm-eval tasks, with commas between.")] = "",
    tokens: Annotated[int | None, typer.Option(min=64, help="The most tokens of text to measure on.")] = None,
    preset: Annotated[str | None, typer.Option(help="quantization: compare models with the first, their original.")] = None,
    questions: Annotated[Path | None, typer.Option(help="Of a preset: JSON lines with question, choices and answer.")] = None,
    truths: Annotated[Path | None, typer.Option(help="Of a preset: the same form, of true and false statements.")] = None,
    pairs: Annotated[Path | None, typer.Option(help="Of a preset: JSON lines with the texts stereotype and other.")] = None,
    page: Annotated[Path | None, typer.Option(help="Of a preset: the HTML file to write.")] = None,
    trust_remote_code: Trust = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Measure models side by side. Size, quality on text (of corpus, its held-out part), speed, memory, energy."""
    from . import report
    from .core.measure import measure as measured
    from .core.model import open as opened
    from .core.progress import silence

    if preset is None and page is not None:
        raise typer.BadParameter("--page goes with --preset quantization")
    more: dict[str, Any] = {"data": data, "tasks": [task for task in tasks.split(",") if task], "most_tokens": tokens}
    more |= {"preset": preset, "questions": questions, "truths": truths, "pairs": pairs}
    with silence(quiet):
        named = [opened(model, trust_remote_code=True) for model in models] if trust_remote_code else models
        rows = []
        for part in [named] if preset else [[model] for model in named]:
            rows += measured(*part, **more)
    if page is not None:
        page.write_text(report.grouped_html(rows), "utf-8")
    print(json.dumps(rows, indent=2)) if as_json else out.print(report.table(rows))


@app.command()
def merge(
    method: Annotated[str, typer.Argument(help="A method of the merge family, such as ties; or a configuration of mergekit, a YAML file.")],
    base: Annotated[str, typer.Argument(help="The model that the donors were fine-tuned from; of a configuration, the folder to write.")],
    donors: Annotated[list[str] | None, typer.Argument(help="The models to merge.")] = None,
    save: Annotated[Path | None, typer.Option(help="The folder to write, for a method; by default merged.")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="A setting of the method, such as keep=0.3. Repeatable.")] = None,
    as_mergekit: Annotated[bool, typer.Option("--as-mergekit", help="Of a configuration, compute the numbers that mergekit does.")] = False,
    data: Annotated[str | None, typer.Option(help="Text, for methods that read some: .txt, .jsonl, a folder, or corpus.")] = None,
    samples: Annotated[int | None, typer.Option(min=1, help="Sequences of the text.")] = None,
    length: Annotated[int | None, typer.Option(min=1, help="Tokens in a sequence.")] = None,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Merge models. By a method, from one that they were fine-tuned from, or as a configuration of mergekit says."""
    from .core.progress import silence

    if Path(method).suffix in (".yaml", ".yml"):
        if donors or set_ or save or data or samples or length:
            raise typer.BadParameter("a configuration names its models and settings itself: modelwright merge config.yaml folder")
        from .mergekit import merge as merge_config

        with silence(quiet):
            made = merge_config(Path(method), save=base, overwrite=overwrite, as_mergekit=as_mergekit)
        _print_merged(made, as_json)
        return
    if not donors or as_mergekit:
        raise typer.BadParameter("--as-mergekit goes with a configuration" if as_mergekit else "name the models to merge after the base")
    from .core import recipe
    from .core.errors import NeedError
    from .core.given import Given

    text = {key: value for key, value in (("data", data), ("samples", samples), ("length", length)) if value is not None}
    stated = {"model": base, **text, "steps": [{_merger(method): {"donors": list(donors)}}], "save": str(save or "merged")}
    asked = recipe.read(stated, [f"steps.0.{setting}" for setting in set_ or []])
    if data is None and Given().untold(asked.steps[0].method):
        raise NeedError(f"{asked.steps[0].method.name()} needs calibration text. Add --data my.txt, or --data corpus.")
    with silence(quiet):
        done = recipe.run(asked, overwrite=overwrite)
    _print_merged(done.model, as_json)


def _merger(method: str) -> str:
    """The whole name of a method that merges.

    Raises:
        MethodError: there is none; it goes by another name here; or it does not merge.
    """
    from .core import find
    from .core.errors import MethodError
    from .mergekit.table import METHODS

    name = method if "." in method else f"merge.{method}"
    if not find.exists(name) and method in METHODS:
        entry = METHODS[method]
        settings = "".join(f" --set {key}={json.dumps(value)}" for key, value in entry.fixed.items())
        raise MethodError(f"{method} is mergekit's name. Here it is {entry.name}: modelwright merge {entry.name[6:]} base donors{settings}")
    if "donors" not in find.find(name).needs():
        raise MethodError(f"{name} does not merge: it takes no donors. Put it into a recipe, and run that: modelwright run recipe.yaml")
    return name


def _print_merged(model: Any, as_json: bool) -> None:
    notes = model.history[-1]["notes"]
    if as_json:
        print(json.dumps({"folder": str(model.folder), "notes": notes}, indent=2))
        return
    for text in notes:
        _note(text)
    out.print(f"saved to {model.folder}", soft_wrap=True)


@app.command("export-adapter")
def export_adapter(
    model: Annotated[str, typer.Argument(help="The folder of a model with an adapter.")],
    save: Annotated[Path, typer.Argument(help="The folder to write.")],
    rank: Annotated[float | None, typer.Option(help="Of each layer at most; below 1 the share of the change's square to hold.")] = None,
    base: Annotated[str | None, typer.Option(help="The original model, where the adapter stands on weights that have changed.")] = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Write an adapter as plain LoRA, for peft alone."""
    from .formats.lora import export_adapter as export

    done = export(model, save, rank=rank, base=base, overwrite=overwrite)
    if as_json:
        print(json.dumps({"folder": str(done.folder), "ranks": done.ranks, "errors": done.errors}, indent=2))
        return
    worst = max(done.errors, key=lambda path: done.errors[path])
    ranks = f"ranks {min(done.ranks.values())} to {max(done.ranks.values())}"
    _note(f"{ranks}; at most {done.errors[worst]:.2%} of a change is missing, at {worst}")
    out.print(f"saved to {done.folder}", soft_wrap=True)


@app.command()
def check(method: Annotated[str, typer.Argument(help="A method, or path/file.py:Class.")], as_json: Json = False) -> None:
    """Check that a method keeps the contract. Each failing check is named with its reason."""
    from .core.contract import check as checked

    results = checked(method)
    if as_json:
        print(json.dumps([result.plain() for result in results], indent=2))
    else:
        for result in results:
            colour = {"passed": "green", "failed": "red", "known": "yellow", "skipped": "bright_black"}[result.outcome]
            out.print(
                f"[{colour}]{result.outcome:8}[/] {_escape(result.check)}{': ' + _escape(result.reason) if result.reason else ''}",
                soft_wrap=True,
            )
        words = {"passed": "passed", "skipped": "not applicable", "known": "known to fail", "failed": "failed"}
        counts = Counter(result.outcome for result in results)
        out.print(", ".join(f"{counts[outcome]} {word}" for outcome, word in words.items() if counts[outcome] or outcome != "known"))
    if any(result.outcome == "failed" for result in results):
        sys.exit(1)


@app.command()
def new(
    family: Annotated[str, typer.Argument(help="The family it belongs to, such as prune.")],
    name: Annotated[str, typer.Argument(help="Its name, such as mine.")],
) -> None:
    """Write a new method and its test. Inside a checkout of Modelwright into its folders, elsewhere into this one."""
    from .core.template import write

    method, test = write(family, name)
    out.print(f"wrote {method} and {test}")
    inside = method.is_absolute()
    out.print(f"next: fill in its verb, then `modelwright check {f'{family}.{name}' if inside else method}`")


if __name__ == "__main__":
    main()

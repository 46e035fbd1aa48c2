"""The command line: what it prints, and what it says when something is wrong."""

from __future__ import annotations

import io
import json
import re
import shutil
from pathlib import Path

import pytest
import standin
from tiny import tiny

import modelwright
from modelwright import cli, report
from modelwright.core import find
from modelwright.core.contract import letters
from modelwright.core.method import SiteMethod
from modelwright.core.model import Model
from modelwright.core.weights import Writer

ROOT = Path(__file__).parents[2]


@pytest.fixture
def call(monkeypatch, capsys, tmp_path):
    """Run `modelwright ...` in an empty folder: (exit code, what it printed, what it said on the error stream)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(cli.out, "_width", 200)

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["modelwright", *arguments])
        with pytest.raises(SystemExit) as end:
            cli.main()
        printed = capsys.readouterr()
        return int(end.value.code or 0), printed.out, printed.err

    return run


def one_line(text: str) -> str:
    return " ".join(text.split())


def test_help_names_every_verb(call):
    code, printed, _ = call("--help")
    assert code == 0
    for verb in ("list", "show", "plan", "run", "apply", "fit", "measure", "merge", "export-adapter", "check", "new"):
        assert verb in printed


def test_version_is_that_of_the_package(call):
    code, printed, _ = call("--version")
    assert code == 0
    assert printed == f"modelwright {modelwright.__version__}\n"


def test_list_has_a_line_for_every_method_with_its_status(call):
    code, printed, _ = call("list")
    assert code == 0
    for name in find.names():
        (line,) = [line for line in printed.splitlines() if line.startswith(f"{name} ")]
        assert find.page(name).status in line


def test_list_of_one_family_as_json(call):
    code, printed, _ = call("list", "prune", "--json")
    rows = json.loads(printed)
    assert code == 0
    assert [row["name"] for row in rows] == [name for name in find.names() if name.startswith("prune.")]
    assert set(rows[0]) == {"name", "summary", "status"}


def test_list_of_an_unknown_family_names_the_nearest(call):
    code, _, said = call("list", "prun")
    assert code == 2
    assert "There is no family 'prun'. Did you mean 'prune'?" in one_line(said)


@pytest.mark.parametrize("name", find.names())
def test_show_has_the_settings_and_the_source_of_a_method(call, name):
    code, printed, _ = call("show", name)
    assert code == 0
    assert "Level:" in printed
    assert "Needs:" in printed
    assert find.page(name).summary in one_line(printed)


def test_show_says_how_to_choose_in_a_family(call):
    code, printed, _ = call("show", "prune")
    assert code == 0
    assert "How to choose" in printed


def test_show_of_an_unknown_method_names_the_nearest(call):
    code, _, said = call("show", "prune.wnda")
    assert code == 2
    assert "There is no method 'prune.wnda'. Did you mean 'prune.wanda'?" in one_line(said)


def test_show_prints_the_schema_as_json(call):
    code, printed, _ = call("show", "--schema")
    assert code == 0
    assert json.loads(printed)["title"] == "A Modelwright recipe, or a comparison"


@pytest.mark.parametrize("name", find.names())
def test_show_says_where_a_method_works_by_default(call, name):
    cls = find.find(name)
    if issubclass(cls, SiteMethod):
        wanted = "by default every tensor, norms and embeddings too" if cls.every else "by default the matrices of the blocks"
        assert wanted in one_line(call("show", name)[1])


def test_plan_has_a_row_for_every_step(call, starter):
    Path("r.yaml").write_text("model: starter\nsteps:\n  - prune.magnitude\n  - quantize.rtn: {bits: 4}\n", "utf-8")
    code, printed, _ = call("plan", "r.yaml", "--json")
    assert code == 0
    rows = json.loads(printed)["rows"]
    assert [row["step"] for row in rows] == ["input", "prune.magnitude", "quantize.rtn"]
    assert rows[2]["bytes"] < rows[1]["bytes"]
    assert call("plan", "r.yaml")[0] == 0
    assert call("run", "r.yaml", "--dry-run")[0] == 0


def test_plan_says_all_that_is_wrong_at_once(call, starter):
    Path("r.yaml").write_text(
        "model: starter\nsteps:\n  - prune.wnda\n  - quantize.gptq: {bit: 4}\n  - prune.magnitude: {sparsity: 3}\n", "utf-8"
    )
    code, _, said = call("plan", "r.yaml")
    said = one_line(said)
    assert code == 2
    assert "3 problems" in said
    assert "Did you mean 'prune.wanda'?" in said
    assert "has no setting 'bit'. Did you mean 'bits'?" in said
    assert "sparsity must be a number from 0 to 1; got 3" in said


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("steps:\n  - quantize.rtn\n  - prune.magnitude\n", "prune.magnitude wants a model that is float"),
        ("steps:\n  - prune.wanda\n", "prune.wanda needs calibration text; the recipe gives none. Add `data:`."),
        ("steps:\n  - merge.ties\n", "merge.ties needs donors"),
        ("stpes:\n  - merge.ties\n", "A recipe has no key 'stpes'. Did you mean 'steps'?"),
        ("steps:\n  - prune.magnitude: {where: mlq}\n", "'mlq' names no part of any model. Did you mean 'mlp'?"),
        ("steps:\n  - prune.magnitude: {where: router}\n", "chooses no weight"),
        ("steps: [\n", "r.yaml is not valid YAML"),
    ],
)  # fmt: skip
def test_plan_refuses_what_cannot_work(call, starter, text, wanted):
    Path("r.yaml").write_text(text, "utf-8")
    code, _, said = call("plan", "r.yaml")
    assert code == 2
    assert wanted in one_line(said)
    assert "Traceback" not in said


def test_a_missing_recipe_and_a_bad_override_are_named(call, starter):
    assert "There is no recipe nowhere.yaml" in one_line(call("plan", "nowhere.yaml")[2])
    Path("r.yaml").write_text("model: starter\nsteps:\n  - quantize.rtn\n", "utf-8")
    assert "An override is written path=value" in one_line(call("plan", "r.yaml", "--set", "steps.0.bits")[2])
    assert "the recipe has 1 step, numbered 0; there is no step 7" in one_line(call("plan", "r.yaml", "--set", "steps.7.bits=4")[2])
    assert "bits must be a whole number from 2 to 8" in one_line(call("plan", "r.yaml", "--set", "steps.0.bits=9")[2])


def test_run_saves_and_refuses_to_overwrite(call, starter):
    Path("r.yaml").write_text("model: starter\nsteps:\n  - quantize.rtn\nsave: out/\n", "utf-8")
    code, printed, _ = call("run", "r.yaml", "--json", "--quiet")
    assert code == 0
    assert [row["step"] for row in json.loads(printed)["account"]] == ["input", "quantize.rtn"]
    code, _, said = call("run", "r.yaml")
    assert code == 2
    assert "exists and is not empty" in one_line(said)
    assert call("run", "r.yaml", "--overwrite", "--set", "steps.0.bits=8")[0] == 0


def test_measure_sets_models_side_by_side(call, starter):
    code, printed, _ = call("measure", "starter", str(starter), "--tokens", "256", "--json")
    assert code == 0
    first, second = json.loads(printed)
    assert first["parameters"] == second["parameters"]
    assert first["bits_per_byte"] == second["bits_per_byte"]


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (("--tokens", "128"), "the first 128 tokens of the held-out part of corpus"),
        ((), "all of the held-out part of corpus"),
        (("--data", "my[1].txt"), "all of my[1].txt"),
    ],
)
def test_measure_says_which_text_it_read(call, starter, arguments, wanted):
    Path("my[1].txt").write_text(standin.documents()[0][0], "utf-8")
    code, printed, _ = call("measure", "starter", *arguments)
    assert code == 0
    assert f"Measured on {wanted}." in one_line(printed)
    assert json.loads(call("measure", "starter", *arguments, "--json")[1])[0]["text"] == wanted


def test_measure_of_a_model_that_is_nowhere_says_so(call, starter):
    code, _, said = call("measure", "nowhere")
    assert code == 2
    assert "'nowhere'" in said


def test_merge_needs_no_recipe(call, starter, tmp_path):
    donors = [str(standin.write(tmp_path / name, seed=seed)) for seed, name in enumerate(("one", "two"), 1)]
    code, printed, _ = call("merge", "ties", "starter", *donors, "--set", "keep=0.5", "--quiet")
    assert code == 0
    assert "saved to" in printed
    assert json.loads((tmp_path / "merged" / "modelwright.json").read_text("utf-8"))["steps"][0]["settings"] == {"keep": 0.5}


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft's, in from_pretrained
def test_export_adapter_writes_plain_lora_and_says_what_is_missing(call, starter):
    assert call("apply", "adapt.svfit", "starter", "adapted", "--set", "rank=4", "--quiet")[0] == 0
    code, printed, _ = call("export-adapter", "adapted", "lora")
    assert code == 0
    assert "ranks 4 to 4; at most 0.00% of a change is missing" in one_line(printed)
    assert json.loads(Path("lora/adapter_config.json").read_text("utf-8"))["peft_type"] == "LORA"
    found = json.loads(call("export-adapter", "adapted", "lower", "--rank", "2", "--json")[1])
    assert set(found["ranks"].values()) <= {0, 2}  # its change is nothing yet
    code, _, said = call("export-adapter", "adapted", "lora")
    assert code == 2
    assert "lora" in said


def test_new_writes_a_method_and_its_test_outside_a_checkout(call, monkeypatch, tmp_path):
    folder = tmp_path / "installed" / "modelwright" / "methods"
    shutil.copytree(find.FOLDER, folder, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(find, "FOLDER", folder)
    code, printed, _ = call("new", "prune", "mine")
    assert code == 0
    assert "mine.py" in printed
    assert find.find("mine.py").__name__ == "Mine"
    assert Path("test_mine.py").is_file()
    code, _, said = call("new", "prune", "mine")
    assert code == 2
    assert "mine.py exists" in one_line(said)


def test_new_writes_into_a_checkout_only_from_inside_of_it(call, monkeypatch, tmp_path):
    folder, tests = tmp_path / "checkout" / "src" / "modelwright" / "methods", tmp_path / "checkout" / "tests" / "methods"
    shutil.copytree(find.FOLDER, folder, ignore=shutil.ignore_patterns("__pycache__"))
    tests.mkdir(parents=True)
    monkeypatch.setattr(find, "FOLDER", folder)
    assert call("new", "prune", "mine")[0] == 0
    assert Path("mine.py").is_file()
    assert not (folder / "prune" / "mine.py").exists()
    monkeypatch.chdir(tests)
    code, printed, _ = call("new", "prune", "mine")
    assert code == 0
    assert "modelwright check prune.mine" in printed
    assert (folder / "prune" / "mine.py").is_file()
    assert (tests / "prune" / "test_mine.py").is_file()


def test_new_refuses_unknown_families_and_bad_names(call):
    assert "There is no family 'prun'. Did you mean 'prune'?" in one_line(call("new", "prun", "mine")[2])
    assert "A method's name is in lower case" in one_line(call("new", "prune", "My-Method")[2])


def test_check_of_what_is_no_method_says_so(call):
    assert call("check", "ties")[::2] == (2, "error: There is no method 'ties'. Did you mean 'merge.ties'? `modelwright list` shows all " +
                                          f"{len(find.names())}.\n")  # fmt: skip
    assert call("check", "nothing.at.all")[0] == 2
    assert call("check", "no.py:X")[2] == "error: no.py:X: there is no file no.py. Write path/file.py:Class.\n"


def test_check_ends_with_one_when_something_fails(call):
    Path("bad.py").write_text('"""No full stop"""\n', "utf-8")
    code, printed, _ = call("check", "bad.py")
    assert code == 1
    assert "failed" in printed
    assert "bad.py" in printed


# What fits a terminal of 80 columns


def wide(table) -> list[str]:
    """The lines of a table on such a terminal."""
    from rich.console import Console

    console = Console(width=80, record=True, file=io.StringIO())
    console.print(table)
    return console.export_text().splitlines()


def test_tables_of_steps_fit_80_columns_with_whole_headings():
    row = {"parameters": 2_830_000, "zeros": 604_000, "bytes_disk": 5_660_000, "bits_per_weight": 5.34, "peak_bytes": 433e6, "seconds": 6.8}
    lines = wide(report.table([{"step": "distill.recover", **row}]))
    assert "parameters" in " ".join(lines)
    assert "…" not in " ".join(lines)
    assert max(map(len, lines)) <= 80


@pytest.mark.parametrize("models", [2, 4])
def test_long_names_of_models_stand_whole_above_their_columns(models):
    row = {"parameters": 2_830_000, "perplexity": 12.3, "perplexity_low": 11.04, "perplexity_high": 13.87, "bytes_disk": 5_660_000}
    names = [f"/experiments/2026/llama-3.2-1b-pruned-at-a-half-[{number}]-and-then-recovered" for number in range(models)]
    lines = wide(report.table([{"model": name, **row} for name in names]))
    assert max(map(len, lines)) <= 80
    assert "…" not in " ".join(lines)
    above = lines[: next(place for place, line in enumerate(lines) if "─" in line)]
    assert sorted("".join("".join(above).split())) == sorted("".join(names))
    assert sum("parameters" in line for line in lines) == 1


def test_a_perplexity_of_one_window_has_no_interval():
    row = {"model": "m", "perplexity": 12.3, "perplexity_low": None, "perplexity_high": None}
    assert any(line.endswith("12.30 (one window)") for line in map(str.strip, wide(report.table([row]))))


def test_summaries_in_the_help_are_whole_at_80_columns(call, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    code, printed, _ = call("--help")
    assert code == 0
    assert "..." not in printed.partition("Commands:")[2]


def test_notes_break_between_words_on_a_terminal(monkeypatch, capsys):
    from rich.console import Console

    file = io.StringIO()
    monkeypatch.setattr(cli, "out", Console(file=file, width=40, force_terminal=True, highlight=False, no_color=True))
    cli._note("prune.shortgpt: blocks removed [2] (from 0); scores of all blocks 1.0313, 0.0983, 0.0596")
    lines = file.getvalue().splitlines()
    assert max(map(len, lines)) <= 40
    assert all(line.startswith("      ") for line in lines[1:])
    assert "[2]" in file.getvalue()


def test_check_ends_with_a_line_of_counts(call, monkeypatch):
    from modelwright.core import contract

    made = [contract.Result(f"c{n}", outcome, "") for n, outcome in enumerate(("passed", "passed", "skipped", "failed"))]
    monkeypatch.setattr(contract, "check", lambda _: made)
    code, printed, _ = call("check", "prune.wanda")
    assert code == 1
    assert printed.splitlines()[-1] == "2 passed, 1 not applicable, 1 failed"


@pytest.fixture
def donors(small, tmp_path):
    """Two models like `small`, by name in the current folder."""
    for seed in (5, 6):
        Model(name="donor", module=tiny("llama", seed=seed), tokenizer=letters()).save(tmp_path / f"donor{seed}")
    return str(small), "donor5", "donor6"


def test_merge_takes_text_for_the_methods_that_read_it(call, donors, text):
    code, _, said = call("merge", "soup", *donors)
    assert code == 2
    assert "merge.soup needs calibration text. Add --data my.txt, or --data corpus." in one_line(said)
    code, printed, _ = call("merge", "soup", *donors, "--data", str(text), "--samples", "2", "--length", "16", "--quiet")
    assert code == 0
    assert "nats on the calibration text" in one_line(printed)
    assert "length: 16" in Path("merged/recipe.yaml").read_text("utf-8")


@pytest.mark.parametrize(
    ("method", "sentence"),
    [
        ("dare_ties", "dare_ties is mergekit's name. Here it is merge.dare: modelwright merge dare base donors --set consensus=true"),
        ("ramplus_tl", 'Here it is merge.ram: modelwright merge ram base donors --set scope="tensor"'),
        ("prune.wanda", "prune.wanda does not merge: it takes no donors."),
        ("tise", "There is no method 'merge.tise'. Did you mean 'merge.ties'?"),
    ],
)
def test_merge_says_which_method_a_name_is(call, donors, method, sentence):
    code, _, said = call("merge", method, *donors)
    assert code == 2
    assert sentence in one_line(said)


def test_a_configuration_and_a_recipe_are_told_apart(call, small):
    Path("config.yaml").write_text(f"merge_method: linear\nmodels:\n  - model: {small}\n    parameters: {{weight: 1}}\n", "utf-8")
    Path("recipe.yaml").write_text(f"model: {small}\nsteps: [prune.magnitude]\nsave: out\n", "utf-8")
    for verb in ("plan", "run"):
        code, _, said = call(verb, "config.yaml")
        assert (code, one_line(said)) == (
            2, "error: This is a configuration of mergekit, and no recipe. Merge it: modelwright merge config.yaml folder/",
        )  # fmt: skip
    code, _, said = call("merge", "recipe.yaml", "out")
    assert (code, one_line(said)) == (
        2, "error: This is a recipe, and no configuration of mergekit. Run it: modelwright run recipe.yaml",
    )  # fmt: skip
    assert "There is no configuration nosuch.yaml. Name a YAML file." in one_line(call("merge", "nosuch.yaml", "out")[2])


def test_a_key_that_stands_twice_is_one_sentence(call, small):
    Path("twice.yaml").write_text(f"model: {small}\nsteps: [prune.magnitude]\nmodel: other\n", "utf-8")
    code, _, said = call("run", "twice.yaml")
    assert (code, one_line(said)) == (2, "error: twice.yaml has the key 'model' twice, the second time in line 3. Keep one.")


def test_extract_says_its_ranks_in_one_note_and_the_record_has_each(call, donors):
    code, printed, _ = call("merge", "extract", *donors[:2], "--set", "rank=2", "--quiet")
    assert code == 0
    notes = [line for line in printed.splitlines() if "have ranks" in line]
    assert "rank 2 of" not in printed
    assert len(notes) == 1
    assert re.search(r"note: merge.extract: \d+ layers have ranks from 2 to 2, with [\d.]+% to [\d.]+% of the squares", notes[0])
    (step,) = json.loads(Path("merged/modelwright.json").read_text("utf-8"))["steps"]
    assert len(step["details"]) == int(re.search(r"(\d+) layers", notes[0])[1])
    assert all("rank 2 of" in line for line in step["details"])


@pytest.mark.parametrize(
    ("arguments", "rest"), [(["merge", "ties"], "nothing was written"), (["merge", "{config}"], "nothing was written"),
                            (["run"], "the same command goes on from here")])  # fmt: skip
def test_an_interrupt_says_what_it_leaves(call, donors, monkeypatch, tmp_path, arguments, rest):
    base, donor, _ = donors

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    Path("c.yaml").write_text(f"merge_method: ties\nbase_model: {base}\nmodels: [{{model: {donor}, parameters: {{weight: 1}}}}]\n", "utf-8")
    Path("r.yaml").write_text(f"model: {base}\nsteps: [prune.magnitude]\nsave: out\n", "utf-8")
    before = sorted(path.name for path in tmp_path.iterdir())
    monkeypatch.setattr(Writer, "add", interrupt)
    monkeypatch.setattr(Writer, "copy", interrupt)
    ways = {"ties": ["merge", "ties", base, donor], "{config}": ["merge", "c.yaml", "out"], "run": ["run", "r.yaml"]}
    code, _, said = call(*ways[arguments[-1]])
    assert (code, said.splitlines()[-1]) == (130, f"interrupted; {rest}")
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_apply_is_a_recipe_of_one_step(call, tmp_path):
    code, printed, _ = call("apply", "quantize.rtn", "starter", str(tmp_path / "out"), "--set", "bits=3", "--set", "group=64", "--dry-run")
    assert code == 0
    assert "quantize.rtn" in printed
    assert not (tmp_path / "out").exists()
    code, printed, _ = call("apply", "quantize.rtn", "starter", str(tmp_path / "out"), "--set", "bits=3", "--set", "group=64")
    assert code == 0
    assert "saved to" in printed
    layer = next(layer for layer in modelwright.open(tmp_path / "out").module.modules() if hasattr(layer, "describe"))
    assert (layer.describe()["bits"], layer.describe()["group"]) == (3, 64)
    assert "steps:\n- quantize.rtn" in (tmp_path / "out" / "recipe.yaml").read_text().replace("  - ", "- ")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["quantize.awk", "starter"], "Did you mean 'quantize.awq'"),
        (["quantize.awq", "starter", "--set", "bit=3"], "Did you mean 'bits'"),
        (["quantize.awq", "starter"], "needs calibration text"),
    ],
)
def test_apply_says_what_is_wrong_before_work_starts(call, tmp_path, arguments, words):
    method, model, *others = arguments
    code, _, told = call("apply", method, model, str(tmp_path / "out"), *others)
    assert code == 2
    assert words in one_line(told)
    assert not (tmp_path / "out").exists()

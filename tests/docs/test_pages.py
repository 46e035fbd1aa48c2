"""What README and docs show works: examples run, recipes plan, commands parse, links lead somewhere."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of one language."""
    return [text for found, text in FENCE.findall(page.read_text("utf-8")) if found == language]


def pages_with(language: str) -> list[Path]:
    return [page for page in PAGES if blocks(page, language)]


def name(page: Path) -> str:
    return page.name


@pytest.fixture
def folder(starter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder, where "starter" and "corpus" are small stand-ins and the pages' example files lie."""
    monkeypatch.chdir(tmp_path)
    for page in PAGES:
        for text in blocks(page, "python"):
            if text.startswith('"""'):  # a whole file, named like its class
                stem = re.search(r"^class (\w+)", text, re.MULTILINE)[1].lower()
                (tmp_path / f"{stem}.py").write_text(text, "utf-8")
    return tmp_path


@pytest.mark.parametrize("page", pages_with("python"), ids=name)
def test_python_examples_run_in_the_order_of_the_page(page, folder, monkeypatch):
    file = folder / f"page_{page.stem.replace('-', '_').lower()}.py"
    file.write_text("\n\n".join(text for text in blocks(page, "python") if not text.startswith('"""')), "utf-8")
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, file.stem, module)
    spec.loader.exec_module(module)


@pytest.mark.parametrize("page", pages_with("yaml"), ids=name)
def test_recipes_can_be_planned(page, folder):
    from modelwright.core import plan, recipe
    from modelwright.mergekit import schema, table

    for text in blocks(page, "yaml"):
        if "merge_method" in text:
            assert all(table.entry_of(config.method) and not config.notes for config in schema.read(text))
            continue
        made = recipe.read(text)
        assert len(plan.plan(made).rows) == 1 + len(made.steps)


@pytest.mark.parametrize("page", pages_with("json"), ids=name)
def test_json_is_valid(page):
    for text in blocks(page, "json"):
        json.loads(text)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_commands_have_known_verbs_and_options(page):
    import typer

    from modelwright import cli

    lines = [line for text in blocks(page, "sh") for line in text.splitlines()]
    lines += re.findall(r"`(modelwright [^`]+)`", page.read_text("utf-8"))
    group = typer.main.get_command(cli.app)
    for line in lines:
        for part in line.split("&&"):
            words = shlex.split(part.partition(">")[0])
            if not words or Path(words[0]).name != "modelwright" or len(words) == 1:
                continue
            context = group.make_context("modelwright", words[1:])
            with context:
                _, command, rest = group.resolve_command(context, words[1:])
                with command.make_context(words[1], rest):
                    pass


def test_every_page_is_in_the_navigation():
    text = (ROOT / "mkdocs.yml").read_text("utf-8")
    assert all(f": {page.name}" in text for page in PAGES[2:])


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_to_files_that_exist(page):
    for target in re.findall(r"\]\(([^)#]+)", page.read_text("utf-8")):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_paths_in_the_text_exist(page):
    for path in re.findall(r"`((?:docs|recipes|tests|src|benchmarks)/[\w./-]+)`", page.read_text("utf-8")):
        assert (ROOT / path).exists() or "/mine.py" in path or "test_mine.py" in path, f"{page.name} speaks of {path}"


def test_the_readme_tree_has_every_folder():
    tree = next(text for text in blocks(PAGES[0], "text") if text.startswith("src/modelwright/"))
    inside = {path.name for path in (ROOT / "src" / "modelwright").iterdir() if (path / "__init__.py").is_file()}
    shown = set(re.findall(r"^  (\w+)/", tree, re.MULTILINE))
    assert shown == inside
    for outer in re.findall(r"^(\S+)/ ", tree, re.MULTILINE):
        assert (ROOT / outer).is_dir(), outer


def test_the_readme_commands_are_those_that_ci_runs():
    install_and_fit, install_and_test = (text.strip() for text in blocks(PAGES[0], "sh")[:2])
    script = (ROOT / ".ci" / "run").read_text("utf-8").splitlines()
    assert install_and_test in [line.strip() for line in script]
    assert "\n" not in install_and_test + install_and_fit
    start = (ROOT / "docs" / "start.md").read_text("utf-8")
    assert install_and_fit.removesuffix(" && .venv/bin/modelwright fit") in start


def test_words_has_every_setting_of_every_method():
    from modelwright.core import find
    from modelwright.core.method import fields_of
    from modelwright.core.recipe import KEYS

    text = (ROOT / "docs" / "words.md").read_text("utf-8")
    words = set(re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE))
    settings = {field.name for method in find.names() for field, _ in fields_of(find.find(method))}
    assert settings - words == set()
    assert set(KEYS) - words == set()
    assert words - settings - set(KEYS) == {"donors", "base", "teacher"}


def test_the_example_method_keeps_the_contract(folder):
    from modelwright.core.contract import check

    failed = [f"{result.check}: {result.reason}" for result in check("nearest.py:Nearest", ("llama",)) if result.outcome == "failed"]
    assert not failed


def test_tables_are_those_of_the_result_files():
    spec = importlib.util.spec_from_file_location("tables", ROOT / "docs" / "tables.py")
    tables = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tables)
    for page in PAGES:
        text = page.read_text("utf-8")
        assert tables.filled(text) == text, f"{page.name}: run `python docs/tables.py`"
    assert tables.block([{"model": "a", "parameters": 2_000}, {"model": "b", "parameters": 1}]) == (
        "|  | a | b |\n| --- | ---: | ---: |\n| parameters | 2 k | 1 |\n"
    )
    rows = [{"step": "x", "seconds": 1.5}, {"step": "y", "seconds": 2345.6}]
    assert tables.block({"command": "go", "machine": {"cores": 2}, "rows": rows}) == (
        "```sh\ngo\n```\n\n| step | seconds |\n| --- | ---: |\n| x | 1.5 |\n| y | 2,346 |\n\n(cores 2)\n"
    )


def test_pins_are_those_of_the_project():
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    extras = project["optional-dependencies"]
    stated = [*project["dependencies"], *(entry for extra in ("test", "lint", "docs") for entry in extras[extra])]
    named = {re.match(r"[\w.-]+", entry)[0].lower() for entry in stated} | {"hatchling", "llvmlite"}  # numba's compiler
    pinned = {line.partition("==")[0] for line in (ROOT / "constraints.txt").read_text("utf-8").splitlines() if "==" in line}
    assert named == pinned

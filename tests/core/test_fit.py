"""fit: budgets, allotment, a result that fits, and what it writes."""

from __future__ import annotations

import csv
import json

import pytest

import modelwright as mw
from modelwright import fit
from modelwright.core import measure, recipe
from modelwright.core.errors import PlanError


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("40%", 400),
        ("2x", 500),
        ("4x", 250),
        ("300", 300),
        ("0.5kB", 500),
        ("1KiB", 1024),
        ("1.5MB", 1_500_000),
        ("2GiB", 2 * 1024**3),
        (250, 250),
    ],
)
def test_budgets_are_read(text, size):
    assert fit.Budget.parse(text, 1000).bytes == size


@pytest.mark.parametrize("text", ["", "forty", "40 percent", "0x", "0", "12XB", "-1"])
def test_other_budgets_are_refused(text):
    with pytest.raises(PlanError, match="budget"):
        fit.Budget.parse(text, 1000)


def test_tilt_moves_bits_from_blocks_that_mind_least_to_those_that_mind_most():
    minds = [0.9, 0.1, 0.5, 0.3]
    assert fit.tilted(4, 0.0, minds) == 4
    assert fit.tilted(4, 0.5, minds) == [5, 3, 4, 4]
    assert fit.tilted(4, 1.0, minds) == [5, 3, 5, 3]
    assert fit.tilted(8, 0.5, minds) == [8, 6, 8, 8]


@pytest.fixture(scope="module")
def fitted(small, text, tmp_path_factory):
    return fit.fit(small, budget="45%", data=text, quick=True, save=tmp_path_factory.mktemp("fit") / "out")


def test_chosen_model_fits_the_budget(fitted, small):
    original = measure.disk_bytes(small)
    assert measure.disk_bytes(fitted.folder / "model") <= 0.45 * original
    assert fitted.table[1]["bytes_disk"] == measure.disk_bytes(fitted.folder / "model")


def test_chosen_is_the_best_trial_within_the_budget(fitted, small):
    within = [row for row in fitted.frontier if row["bytes"] <= 0.45 * measure.disk_bytes(small)]
    best = min(within, key=lambda row: row["nats_per_token"])
    chosen = [step.plain() for step in fitted.recipe.steps if step.method.name() != "distill.recover"]
    assert chosen == json.loads(best["steps"])


def test_all_files_are_there(fitted):
    names = {path.name for path in fitted.folder.iterdir()}
    assert names == {"model", "recipe.yaml", "report.html", "frontier.csv"}
    assert (fitted.folder / "model" / "README.md").is_file()
    rows = list(csv.DictReader((fitted.folder / "frontier.csv").read_text().splitlines()))
    assert len(rows) == len(fitted.frontier) == 10
    assert recipe.read(f"model: starter\nsteps: {rows[0]['steps']}\n").steps  # a recipe takes them as they are
    assert recipe.read(str(fitted.folder / "recipe.yaml")) == fitted.recipe


def test_report_needs_no_other_file_and_shows_all_plots(fitted):
    page = (fitted.folder / "report.html").read_text()
    assert page.count("<svg") == 2
    assert "http://" not in page.replace("http://www.w3.org", "").replace("http://purl.org", "").replace("http://creativecommons.org", "")
    assert "src=" not in page
    assert "before" not in page[:50]
    for words in ("budget 45%", "block removed", "Continuations", "The recipe", "perplexity"):
        assert words in page


def test_card_says_how_to_load(fitted):
    card = (fitted.folder / "model" / "README.md").read_text()
    config = json.loads((fitted.folder / "model" / "config.json").read_text())
    ours = config["quantization_config"]["quant_method"] == "modelwright"
    assert ("import modelwright" in card.split("```python")[1].split("```")[0]) is ours


def test_held_out_text_is_not_in_what_the_search_sees(small, text, tmp_path):
    job = fit.Job(mw.open(small), "small", fit.Budget(1, "1"), str(text), fit.Effort.quick(), 0, tmp_path)
    seen = set("".join(job.calibration.documents).splitlines())
    assert not seen & {line for line in "".join(job.held.documents).splitlines() if line.strip()}
    assert fitted_recipe_leaves_it_out(job)


def fitted_recipe_leaves_it_out(job) -> bool:
    made = recipe.read({"model": "starter", "data": {"source": job.data, "held": [fit.HELD, fit.SCORED]}, "steps": ["prune.magnitude"]})
    return recipe.read_data(made.data).documents == job.calibration.documents


def test_no_trial_within_the_budget_says_the_nearest(small, text, tmp_path):
    with pytest.raises(
        PlanError, match=r"None of 2 trials meets the budget of 1,000 bytes.*The nearest has [0-9,]+ bytes: .*quantize.gptq"
    ):
        fit.fit(small, budget=1000, data=text, quick=True, trials=2, save=tmp_path / "out")

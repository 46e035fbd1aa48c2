"""fit: budgets, allotment, a result that fits, and what it writes."""

from __future__ import annotations

import csv
import json
import types

import pytest

import modelwright as mw
from modelwright import fit, report
from modelwright.core import find, measure, model, recipe
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


def test_bits_go_to_the_blocks_that_mind_most_within_their_average():
    # A bit more makes the harm a quarter, so blocks that mind 16 times as much as others get 2 bits more: 3 and 5 around 4.
    assert fit.allotted(4, 1.0, [1.6, 0.1, 1.6, 0.1]) == [5, 3, 5, 3]
    assert fit.allotted(4, 0.0, [1.6, 0.1, 1.6, 0.1]) == 4
    assert fit.allotted(4, 1.0, [0.2, 0.2, 0.2]) == 4
    for tilt in (0.3, 0.7, 1.0):
        found = fit.allotted(4, tilt, minds := [0.5, -0.01, 0.04, 3.0])  # rounding one may even help
        widths = found if isinstance(found, list) else [found] * 4
        assert sum(widths) <= 16
        assert sorted(widths) == [widths[place] for place in sorted(range(4), key=lambda place: minds[place])]
    assert fit.allotted(8, 1.0, [0.5, 0.1]) == 8  # there is no wider one
    assert fit.allotted(4, 1.0, []) == 4
    assert fit.allotted(4, 1.0, [float("nan"), 1.6, 0.1, 0.1]) == [5, 5, 3, 3]  # what breaks the model minds as much as any


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
    uneven = report.uneven(report.bits_by_matrix(mw.open(fitted.folder / "model")))
    assert page.count("<svg") == 2 + uneven
    assert ("Bits of each matrix" in page) == uneven
    assert "http://" not in page.replace("http://www.w3.org", "").replace("http://purl.org", "").replace("http://creativecommons.org", "")
    assert "src=" not in page
    assert "before" not in page[:50]
    for words in ("budget 45%", "block removed", "Continuations", "The recipe", "perplexity"):
        assert words in page


def test_report_card_and_table_say_which_text_was_measured(fitted, text):
    wanted = f"all of the held-out 10% of {text}"
    assert [row["text"] for row in fitted.table] == [wanted, wanted]
    for file in ("report.html", "model/README.md"):
        assert f"Measured on {wanted}." in (fitted.folder / file).read_text()


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


def test_effort_falls_with_the_root_of_the_size_and_follows_tokens():
    full = fit.Effort()
    assert full.for_size(fit.WHOLE) == full
    large = full.for_size(16 * fit.WHOLE)
    assert (large.trials, large.tokens, large.length, large.score) == (36, full.tokens // 4, 256, 6)
    assert (large.recover, large.final, large.probes) == (20_000, 25_000, ("bits",))
    assert full.for_size(10**15).tokens == fit.FEWEST
    assert full.of(2 * full.tokens) == fit.Effort(samples=96, score=48, recover=160_000, final=200_000)
    assert full.of(64).tokens == 64


def test_a_search_holds_one_model_and_leaves_the_original_as_it_was(small, text, tmp_path, monkeypatch):
    """No trial is worked on in the memory of the original, and the original is not there while trials run."""
    loaded = []
    job = fit.Job(mw.open(str(small)), "small", fit.Budget(1, "1"), str(text), fit.Effort.quick(), 0, tmp_path)
    original = job.score(job.model.module)
    job.forget()
    score = fit.Job.score
    monkeypatch.setattr(fit.Job, "score", lambda job, *rest: loaded.append(job.model.loaded) or score(job, *rest))
    size, found = fit.try_out(job, [recipe.Step(find.find("quantize.rtn").build({"bits": 2}))])
    assert loaded == [False]
    assert 0 < size < measure.disk_bytes(small)
    assert found != original
    assert job.score(job.model.module) == original
    assert list(tmp_path.iterdir()) == []


def test_trust_in_remote_code_reaches_every_opening_of_the_original(small, text, tmp_path, monkeypatch):
    said = []
    read_config = model.read_config

    def heard(folder, trust=False):
        said.extend([trust] if folder == small else [])
        return read_config(folder, trust)

    monkeypatch.setattr(model, "read_config", heard)
    fit.fit(str(small), budget="60%", data=text, quick=True, trials=2, save=tmp_path / "out", trust_remote_code=True)
    assert said
    assert all(said)


def test_recovery_is_left_out_where_memory_is_short(small, text, tmp_path, monkeypatch, capfd):
    job = fit.Job(mw.open(str(small)), "small", fit.Budget(1, "1"), str(text), fit.Effort.quick(), 0, tmp_path)
    steps = [recipe.Step(find.find("quantize.rtn").build({}))]
    (recovered,) = fit.with_recovery(job, steps)
    needed = fit.training_peak(job, job.model.skeleton(), recovered[-1].method)
    parameters = sum(value.numel() for value in job.model.skeleton().parameters())
    assert needed > 16 * parameters + 2 * measure.stored_bytes(job.model.skeleton())
    for free, left_out in ((needed, False), (needed - 1, True)):
        monkeypatch.setattr(fit.psutil, "virtual_memory", lambda free=free: types.SimpleNamespace(available=free))
        assert (not fit.with_recovery(job, steps)) is left_out
    assert "recovery is left out" in " ".join(capfd.readouterr().err.split())

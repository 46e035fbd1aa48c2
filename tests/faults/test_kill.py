"""Killed at any point, a run goes on and ends as if it had not been; no half-written folder bears the final name."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from killing import contents, killed_at

import modelwright as mw
from modelwright import fit
from modelwright.core.errors import RecipeError

STEPS = {
    "layer step, between blocks": ("- quantize.gptq: {bits: 4, group: 32}", ("modelwright.core.passage", "Resident.keep", 3)),
    "layer step, while writing": ("- quantize.gptq: {bits: 4, group: 32}", ("modelwright.core.weights", "Writer.copy", 20)),
    "tensor step": ("- quantize.rtn: {bits: 4, group: 32}", ("modelwright.core.weights", "Writer.add", 9)),
    "block step": ("- prune.shortgpt: {blocks: 1}", ("modelwright.core.weights", "Writer.copy", 5)),
    "training": ("- train: {tokens: 640, batch: 2, length: 16, save_every: 5}", ("modelwright.core.training", "save", 3)),
    "adapter": ("- adapt.lora: {rank: 2}\n- train: {tokens: 320, batch: 2, length: 16, save_every: 4}\n- adapt.fold",
                ("modelwright.core.training", "save", 2)),
    "between steps": ("- prune.magnitude\n- quantize.rtn: {group: 32}", ("modelwright.core.recipe", "write_json", 2)),
    "the last rename": ("- prune.magnitude", ("modelwright.core.recipe", "_keep_base", 1)),
}  # fmt: skip


@pytest.mark.parametrize("case", STEPS)
def test_killed_run_resumes_to_the_same_bytes(case: str, small: Path, text: Path, tmp_path: Path) -> None:
    steps, moment = STEPS[case]
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model: {small}\ndata: {text}\nsamples: 16\nlength: 32\nsteps:\n{steps}\n")
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    mw.run(recipe, overrides=[f"save={straight}"])
    killed_at(*moment, lambda: mw.run(recipe, overrides=[f"save={killed}"]))
    assert not killed.exists(), "a half-written folder bears the final name"
    mw.run(recipe, overrides=[f"save={killed}"])
    assert contents(killed) == contents(straight)
    left = [path.name for path in tmp_path.iterdir() if path not in (recipe, straight, killed)]
    assert not left, f"something was left behind: {left}"


@pytest.mark.parametrize(
    "moment",
    [
        ("modelwright.fit", "try_out", 4),
        pytest.param(("modelwright.core.recipe", "write_json", 1), marks=pytest.mark.slow),
        pytest.param(("modelwright.fit", "publish", 1), marks=pytest.mark.slow),
    ],
)
def test_killed_fit_resumes_to_the_same_model(moment: tuple[str, str, int], small: Path, text: Path, tmp_path: Path) -> None:
    straight, killed = tmp_path / "straight", tmp_path / "killed"

    def work(save: Path) -> None:
        fit.fit(small, budget="60%", data=text, quick=True, trials=6, save=save)

    work(straight)
    killed_at(*moment, lambda: work(killed))
    assert not killed.exists()
    work(killed)
    one, two = contents(killed), contents(straight)
    assert one.keys() == two.keys()
    assert [name for name in one if name != "frontier.csv" and one[name] != two[name]] == []


def test_recipe_of_a_fit_gives_the_same_bytes_again_from_another_directory(
    small: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(small, tmp_path / "here" / "model")
    shutil.copy(text, tmp_path / "here" / "text.txt")
    monkeypatch.chdir(tmp_path / "here")
    fit.fit("model", budget="60%", data="text.txt", quick=True, trials=3, save=tmp_path / "fitted")
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path / "there")
    mw.run(tmp_path / "fitted" / "recipe.yaml", overrides=[f"save={tmp_path / 'again'}"])
    first, second = contents(tmp_path / "fitted" / "model"), contents(tmp_path / "again")
    assert first == second


def test_a_search_goes_on_after_a_process_was_killed_with_the_studys_lock(small: Path, text: Path, tmp_path: Path) -> None:
    def work() -> None:
        fit.fit(small, budget="60%", data=text, quick=True, trials=3, save=tmp_path / "out")

    # Inside the lock the journal is synced for every entry; the killed process leaves a line half written, too.
    killed_at("optuna.storages.journal._file", "os.fsync", 40, work)
    (journal,) = tmp_path.glob("out.fit/*/study.journal")
    journal.write_bytes(journal.read_bytes()[:-5])
    work()
    assert (tmp_path / "out" / "model").is_dir()


def test_processes_that_share_a_fit_go_on_when_one_is_killed_with_the_lock(small: Path, text: Path, tmp_path: Path) -> None:
    """The first is killed as it concludes; of two others, one finishes and the other says so."""

    def work() -> None:
        fit.fit(small, budget="60%", data=text, quick=True, trials=3, save=tmp_path / "out")

    killed_at("modelwright.fit", "settle", 1, work)
    children = []
    for _ in range(2):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                work()
                code = 0
            except RecipeError:
                code = 7
            finally:
                os._exit(code)
        children.append(child)
    codes = sorted(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children)
    assert codes == [0, 7]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_a_process_finds_that_another_finished_the_fit_meanwhile(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(RecipeError, match="has finished it"), fit.shared(tmp_path / "work", tmp_path / "out"):
        os.rmdir(tmp_path / "work" / "removed with the work folder")

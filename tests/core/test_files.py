"""Folders appear whole or not at all, and an overwrite that is killed loses nothing."""

from __future__ import annotations

import os

import pytest
from killing import killed_at

import modelwright as mw
from modelwright.core import files
from modelwright.core.errors import RecipeError, WeightsError
from modelwright.core.files import publish, refuse_existing, refuse_inputs, restore, whole_folder
from modelwright.core.weights import Writer
from modelwright.methods.prune.magnitude import Magnitude


def folder(path, text):
    path.mkdir()
    (path / "text").write_text(text)
    return path


@pytest.fixture(params=["exchange", "two renames"])
def way(request, monkeypatch):
    """Both ways to replace a folder; the second is that of systems without the first."""
    if request.param == "two renames":
        monkeypatch.setattr(files, "exchange", lambda *_: False)
    return request.param


def test_a_folder_takes_the_place_of_another(tmp_path, way):
    publish(folder(tmp_path / "new", "new"), folder(tmp_path / "there", "old"))
    assert (tmp_path / "there" / "text").read_text() == "new"
    assert os.listdir(tmp_path) == ["there"]


def test_a_link_is_replaced_and_what_it_leads_to_is_not(tmp_path, way):
    old = folder(tmp_path / "old", "old")
    (tmp_path / "there").symlink_to(old)
    publish(folder(tmp_path / "new", "new"), tmp_path / "there")
    assert (tmp_path / "there" / "text").read_text() == "new"
    assert (old / "text").read_text() == "old"
    assert sorted(os.listdir(tmp_path)) == ["old", "there"]


MOMENTS = {
    "exchange": [("os", "rename", 1), ("modelwright.core.files", "exchange", 1), ("modelwright.core.files", "_remove", 2)],
    "two renames": [*(("os", "rename", at) for at in (1, 2, 3, 4)), ("modelwright.core.files", "_remove", 2)],
}


@pytest.mark.parametrize("at", range(5))
def test_killed_at_any_moment_of_an_overwrite_the_name_has_the_old_or_the_new(tmp_path, way, at):
    if at >= len(MOMENTS[way]):
        pytest.skip("this way has fewer moments")
    there = folder(tmp_path / "there", "old")

    def overwrite():
        with whole_folder(there, overwrite=True) as partial:
            (partial / "text").write_text("new")

    killed_at(*MOMENTS[way][at], overwrite)
    restore(there)
    assert (there / "text").read_text() == ("new" if "_remove" in MOMENTS[way][at] else "old")
    overwrite()
    assert (there / "text").read_text() == "new"
    assert os.listdir(tmp_path) == ["there"]


def test_a_model_whose_overwrite_was_killed_between_the_renames_opens_as_before(small, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "exchange", lambda *_: False)
    out = tmp_path / "out"
    mw.apply(small, Magnitude(sparsity=0.3), save=out)
    before = (out / "model.safetensors").read_bytes()
    # The first rename names the weight file.
    killed_at("os", "rename", 5, lambda: mw.apply(small, Magnitude(sparsity=0.6), save=out, overwrite=True))
    assert not out.exists()
    assert (mw.open(out).folder / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize("error", [RecipeError, WeightsError])
def test_a_file_is_never_replaced(tmp_path, error):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(error, match="it is a file"):
        refuse_existing(tmp_path / "file", overwrite=True, error=error)


def test_a_writer_finds_what_a_killed_one_moved_away(tmp_path):
    folder(tmp_path / ".there.replaced", "old")
    with pytest.raises(WeightsError, match="not empty"):
        Writer(tmp_path / "there")
    assert (tmp_path / "there" / "text").read_text() == "old"


def test_only_one_process_at_a_time_is_inside_and_a_killed_one_leaves(tmp_path):
    lock = tmp_path / "lock"

    def inside():
        with files.locked(lock):
            os.getppid()

    killed_at("os", "getppid", 1, inside)
    inside()  # would wait forever


def test_a_folder_that_is_or_holds_an_input_is_not_written(tmp_path):
    source = folder(tmp_path / "in", "x")
    refuse_inputs(tmp_path / "in" / "out", [source])
    for final in (source, tmp_path, tmp_path / "in" / ".." / "in"):
        with pytest.raises(RecipeError, match="is, or holds, the input"):
            refuse_inputs(final, [source])

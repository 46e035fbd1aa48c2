"""Folders appear whole or not at all, and an overwrite that is killed loses nothing."""

from __future__ import annotations

import os
import shutil
import tempfile

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


def test_a_link_stays_and_the_result_lies_where_it_leads(tmp_path, way):
    for number, make in enumerate((whole_folder, Writer)):
        old = folder(tmp_path / f"old {number}", "old")
        link = tmp_path / f"there {number}"
        link.symlink_to(old)
        with make(link, overwrite=True) as made:
            (getattr(made, "partial", made) / "text").write_text("new")
        assert link.readlink() == old
        assert (old / "text").read_text() == "new"
    assert sorted(os.listdir(tmp_path)) == ["old 0", "old 1", "there 0", "there 1"]


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


def test_a_folder_of_the_user_is_not_taken_for_a_half_written_one(tmp_path):
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "mine.txt").write_text("mine")
    with pytest.raises(RecipeError, match="is there already. Move it away"), whole_folder(tmp_path / "out"):
        pass
    with pytest.raises(RecipeError, match="is there already"):
        Writer(tmp_path / "out")
    assert (tmp_path / "out.partial" / "mine.txt").read_text() == "mine"


def test_the_mark_of_a_half_written_folder_is_gone_when_it_is_whole(tmp_path):
    for _ in range(2):
        with whole_folder(tmp_path / "out", overwrite=True) as partial:
            (partial / "a").write_text("a")
        assert [path.name for path in (tmp_path / "out").iterdir()] == ["a"]


@pytest.mark.parametrize("final", [".", "./", "..", "../in", "link"])
def test_the_current_folder_and_those_that_hold_it_are_never_replaced(small, tmp_path, monkeypatch, final):
    (tmp_path / "in").mkdir()
    monkeypatch.chdir(tmp_path / "in")
    if final == "link":
        (tmp_path / "in" / "link").symlink_to(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    for save in (
        lambda: mw.run(str(small), [Magnitude()], save=final, overwrite=True),
        lambda: mw.apply(small, Magnitude(), save=final, overwrite=True),
        lambda: mw.merge({"merge_method": "passthrough", "models": [{"model": str(small)}]}, save=final, overwrite=True),
    ):
        with pytest.raises(RecipeError, match=f"saved to {final}: a result takes the place of its folder, and this one is or holds"):
            save()
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("final", "sentence"),
    [
        ("dangling", "it is a link to .*nowhere, which is not there"),
        ("a file/sub", "a file is a file, and not a folder"),
        ("a file/sub/deeper", "a file is a file, and not a folder"),
        ("read only", "its mode says that it is not writable"),
    ],
)
def test_a_place_where_nothing_can_lie_is_said_before_work(small, tmp_path, monkeypatch, final, sentence):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "a file").touch()
    (tmp_path / "read only").mkdir(mode=0o555)
    before = sorted(tmp_path.rglob("*"))
    for save in (
        lambda: mw.run(str(small), [Magnitude()], save=final),
        lambda: mw.apply(small, Magnitude(), save=final),
        lambda: mw.merge({"merge_method": "passthrough", "models": [{"model": str(small)}]}, save=final),
        lambda: mw.fit(str(small), save=final),
        lambda: mw.open(small).save(final),
    ):
        with pytest.raises(RecipeError, match=f"Nothing can be saved to {final}: .*{sentence}"):
            save()
    assert sorted(tmp_path.rglob("*")) == before


def test_a_folder_above_that_is_not_writable_is_said():
    made = tempfile.mkdtemp()  # that everyone may enter
    os.chmod(made, 0o555)
    child = os.fork()
    if child == 0:
        try:
            if not os.geteuid():
                os.setuid(65534)  # whom modes bind
            refuse_existing(f"{made}/out", overwrite=False)
        except RecipeError as error:
            os._exit(0 if str(error).startswith(f"Nothing can be saved to {made}/out: the folder {made} is not writable") else 1)
        finally:
            os._exit(2)
    _, status = os.waitpid(child, 0)
    os.rmdir(made)
    assert os.waitstatus_to_exitcode(status) == 0


def test_a_second_run_into_one_folder_is_refused_and_the_first_finishes(small, tmp_path):
    out = tmp_path / "out"
    merge = {"merge_method": "passthrough", "models": [{"model": str(small)}]}
    for first in (lambda: mw.run(str(small), [Magnitude()], save=str(out)), lambda: mw.apply(small, Magnitude(), save=out)):
        with files.alone(out):
            for second in (first, lambda: mw.merge(merge, save=out)):
                with pytest.raises(RecipeError, match="Another process is saving to .*out now"):
                    second()
            assert [path.name for path in tmp_path.iterdir()] == ["out.steps"]
        first()
        assert [path.name for path in tmp_path.iterdir()] == ["out"]
        shutil.rmtree(out)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_no_empty_folder_of_steps_stays(tmp_path, error):
    with pytest.raises(error), files.alone(tmp_path / "out"):
        raise error
    assert not list(tmp_path.iterdir())


def test_an_input_is_never_written_into(small, tmp_path):
    given = shutil.copytree(small, tmp_path / "given")
    before = sorted(given.rglob("*"))
    for save in (
        lambda: mw.run(str(given), [Magnitude()], save=str(given / "sub")),
        lambda: mw.apply(given, Magnitude(), save=given / "sub"),
    ):
        with pytest.raises(RecipeError, match="lies inside the input"):
            save()
    assert sorted(given.rglob("*")) == before


def test_what_holds_an_input_is_never_written_to(tmp_path):
    refuse_inputs(tmp_path / "out", [tmp_path / "in"])
    for final in (tmp_path / "models" / "base", tmp_path / "models"):
        with pytest.raises(RecipeError, match="is, or holds, the input"):
            refuse_inputs(final, [tmp_path / "models" / "base"])

"""What long work says when nobody looks at a terminal."""

import pytest

from modelwright.core import progress


@pytest.fixture
def clock(monkeypatch):
    seconds = iter(range(0, 1000, 10))
    monkeypatch.setattr(progress.time, "monotonic", lambda: float(next(seconds)))


@pytest.mark.usefixtures("clock")
def test_a_log_gets_a_line_now_and_then(capsys):
    assert list(progress.track(range(9), "counting")) == list(range(9))
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("counting: ")
    assert lines[0].endswith(" of 9")
    assert 0 < len(lines) < 4


@pytest.mark.usefixtures("clock")
def test_quiet_work_says_nothing(capsys):
    with progress.silence():
        assert list(progress.track(range(9), "counting")) == list(range(9))
    assert capsys.readouterr().err == ""


def test_short_work_says_nothing(capsys):
    assert list(progress.track(range(9), "counting")) == list(range(9))
    assert capsys.readouterr().err == ""

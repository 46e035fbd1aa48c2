"""Every method keeps the contract, on every kind of model where it applies."""

from __future__ import annotations

import pytest

from modelwright.core import contract, find


@pytest.mark.parametrize(("check", "kind"), list(contract.checks()), ids=lambda value: value or "record")
@pytest.mark.parametrize("method", find.names())
def test_method_keeps_the_contract(method: str, check: str, kind: str) -> None:
    result = contract.run(find.find(method), check, kind)
    if result.outcome == "skipped":
        pytest.skip(result.reason)
    assert result.outcome in ("passed", "known"), result.reason


def test_a_method_that_breaks_its_promise_is_found(tmp_path) -> None:
    file = tmp_path / "broken.py"
    file.write_text(
        '"""Zero weights, and say otherwise."""\n'
        "from dataclasses import dataclass\n"
        "from modelwright.core.method import TensorMethod\n"
        "@dataclass(frozen=True, kw_only=True)\n"
        "class Broken(TensorMethod):\n"
        '    """Promises half the weights and zeroes none."""\n'
        "    def tensor(self, weight):\n"
        "        return weight\n"
        "    def promise(self):\n"
        '        return {"zeros": 0.5}\n'
    )
    failed = {result.check for result in contract.check(f"{file}:Broken", kinds=("llama",)) if result.outcome == "failed"}
    assert {"promise_is_kept [llama]", "defaults_do_something [llama]", "page_is_complete"} <= failed


@pytest.mark.parametrize(
    ("verb", "reason", "outcome"),
    [
        ("return weight", "it changes nothing", "known"),
        ("raise SiteError('This weight is too odd.')", "too odd", "known"),
        ("raise SiteError('This weight is too odd.')", "it changes nothing", "failed"),
        ("raise RuntimeError('it changes nothing')", "it changes nothing", "failed"),
        ("assert False, 'it changes nothing'", "it changes nothing", "failed"),
        ("return weight * 0", "it changes nothing", "failed"),
    ],
)
def test_a_known_failure_is_the_checks_own_or_has_the_words_of_the_reason(tmp_path, verb: str, reason: str, outcome: str) -> None:
    file = tmp_path / "known.py"
    file.write_text(
        '"""Fail as it says."""\n'
        "from dataclasses import dataclass\n"
        "from modelwright.core.errors import SiteError\n"
        "from modelwright.core.method import TensorMethod\n"
        "@dataclass(frozen=True, kw_only=True)\n"
        "class Known(TensorMethod):\n"
        '    """Fails as it says."""\n'
        f"    fails = {{'defaults_do_something': {reason!r}}}\n"
        "    def tensor(self, weight):\n"
        f"        {verb}\n"
    )
    assert contract.run(find.find(f"{file}:Known"), "defaults_do_something", "llama").outcome == outcome


def test_a_check_is_made_on_the_kinds_that_a_method_names_where_the_usual_ones_are_none_of_them() -> None:
    alone = find.find("quantize.repq_vit")
    for kinds, name, expected in [
        (("gpt2",), "same_seed_gives_same_bits", ("gpt2",)),
        (("llama", "vit"), "same_seed_gives_same_bits", ("llama", "vit")),
        ((), "same_seed_gives_same_bits", ("llama", "vit")),
        ((), "dtype_is_kept", contract.KINDS),
        (("vit",), "skipped_blocks_stay", ("vit",)),
    ]:
        assert contract.kinds_of(type("Other", (alone,), {"checked_on": kinds}), name) == expected


def test_a_method_that_has_no_place_in_a_model_leaves_no_folder(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert contract.run(find.find("train"), "defaults_do_something", "vit").outcome == "skipped"
    assert not list(tmp_path.iterdir())


def test_a_file_that_cannot_be_imported_fails_by_name(tmp_path) -> None:
    file = tmp_path / "worse.py"
    file.write_text("import no_such_module\n")
    (result,) = contract.check(f"{file}:Worse")
    assert result.outcome == "failed"
    assert "no_such_module" in result.reason

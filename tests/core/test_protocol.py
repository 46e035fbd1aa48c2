"""The protocol that scores merges, on a small model and experts of two kinds of letters."""

from __future__ import annotations

import math

import pytest
import torch

import modelwright as mw
from modelwright import protocol, report
from modelwright.core.contract import letters
from modelwright.core.errors import SettingError
from modelwright.core.model import Model
from modelwright.core.tiny import tiny
from modelwright.methods.merge.linear import Linear
from modelwright.methods.merge.ties import Ties


@pytest.fixture(scope="module")
def league(tmp_path_factory):
    """A base, an expert for each of two kinds, and the kinds."""
    folder = tmp_path_factory.mktemp("league")
    words = {"first": "ab ba " * 900, "second": "dc cd " * 900, "unseen": "xy yx " * 900, "own": "mn nm " * 900}
    for name, text in words.items():
        lines = [text[start : start + 60] + f"{start}" for start in range(0, len(text), 60)]
        (folder / f"{name}.txt").write_text("\n\n".join(lines))
    Model(name="base", module=tiny("llama", 0), tokenizer=letters()).save(folder / "base")
    for name in ("first", "second"):
        made = mw.run(
            folder / "base", [mw.find("train")(tokens=12_000, batch=8, length=32, learning_rate=3e-3)],
            data=str(folder / f"{name}.txt"), save=str(folder / f"expert-{name}"),
        )  # fmt: skip
        assert made.model.folder is not None
    kinds = protocol.Kinds(
        experts={name: folder / f"{name}.txt" for name in ("first", "second")},
        unseen=folder / "unseen.txt",
        own=folder / "own.txt",
        tokens=600,
    )
    return folder / "base", {name: folder / f"expert-{name}" for name in ("first", "second")}, kinds


@pytest.fixture(scope="module")
def rows(league):
    base, experts, kinds = league
    return protocol.merges(base, experts, kinds, {"mean": Linear(), "first alone": Linear(weights=[1, 0]), "ties": Ties(keep=0.5)})


def test_base_and_experts_are_their_own_references(rows):
    base, first, second = rows[:3]
    assert [row["model"] for row in rows] == ["base", "first", "second", "mean", "first alone", "ties"]
    assert base["held-out"] == pytest.approx(1)
    assert base["forgetting"] == pytest.approx(0)
    assert first["first"] == second["second"] == pytest.approx(1)
    assert base["first"] < 1
    assert second["first"] < 1


def test_a_merge_that_is_one_expert_scores_as_that_expert(rows):
    first, alone = rows[1], rows[4]
    for column in ("held-in", "first", "second", "held-out", "forgetting"):
        assert alone[column] == pytest.approx(first[column], rel=1e-3)
    assert alone["seconds"] > 0
    assert alone["peak MB"] > 50


def test_held_in_is_the_mean_over_experts(rows):
    for row in rows:
        assert row["held-in"] == pytest.approx((row["first"] + row["second"]) / 2)


def test_scores_are_ratios_of_perplexities():
    known = {"base": {"a": 3.0, "unseen": 2.0, "own": 1.0}, "a": {"a": 1.0, "unseen": 2.5, "own": 1.5}}
    found = protocol.row("merged", {"a": 1.5, "unseen": 2.2, "own": 1.1}, known, ["a"])
    assert found["held-in"] == pytest.approx(math.exp(-0.5))
    assert found["held-out"] == pytest.approx(math.exp(-0.2))
    assert found["forgetting"] == pytest.approx(1 - math.exp(-0.1))


def test_names_of_experts_and_texts_must_agree(league):
    base, experts, kinds = league
    with pytest.raises(SettingError, match="'second' has no text"):
        protocol.merges(base, experts, protocol.Kinds(experts={"first": kinds.experts["first"]}, unseen=kinds.unseen, own=kinds.own), {})


def test_interference_by_hand(tmp_path):
    folders = {}
    for name in ("base", "up", "down", "same"):
        module = tiny("llama", 0)
        if name != "base":
            with torch.no_grad():
                for layer in module.model.layers:
                    for weight in layer.parameters():
                        weight.add_(torch.ones_like(weight) * (-0.01 if name == "down" else 0.01))
        module.save_pretrained(tmp_path / name)
        folders[name] = tmp_path / name
    against = protocol.interference(folders["base"], {"up": folders["up"], "down": folders["down"]}, keep=1.0)
    alike = protocol.interference(folders["base"], {"up": folders["up"], "same": folders["same"]}, keep=1.0)
    assert [row["block"] for row in against] == [0, 1, 2, 3]
    assert all(row["conflicts"] == 1 and row["alike"] == pytest.approx(-1, abs=1e-3) for row in against)
    assert all(row["conflicts"] == 0 and row["alike"] == pytest.approx(1, abs=1e-3) for row in alike)


def test_the_page_shows_every_row_and_both_plots(rows, league):
    page = protocol.page(rows, protocol.interference(*league[:2]))
    assert all(f"<td>{row['model']}</td>" in page for row in rows)
    assert page.count("<svg") == 2
    assert report.STYLE.strip().splitlines()[0] in page


def test_every_method_is_offered():
    found = protocol.every_method(3, ties={"keep": 0.3})
    assert found["ties"] == Ties(keep=0.3)
    assert {"linear", "task_arithmetic", "dare", "della", "breadcrumbs", "soup", "evolve", "auto"} <= set(found)
    assert not {"slerp", "extract", "adapters", "moe"} & set(found)  # for other numbers of donors, or of another form

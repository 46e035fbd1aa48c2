"""The plot of the bits that each matrix has."""

from __future__ import annotations

import json
import math
import re

import pytest
import torch
from tiny import tiny

import modelwright as mw
from modelwright import report
from modelwright.core.given import Given
from modelwright.core.model import Model
from modelwright.core.walk import change
from modelwright.methods.prune.magnitude import Magnitude
from modelwright.methods.quantize.mixed import Mixed
from modelwright.methods.quantize.nf4 import Nf4
from modelwright.methods.quantize.rtn import Rtn


def texts_in(svg: str) -> list[str]:
    """What matplotlib says each drawn text is."""
    return re.findall(r"<!-- (.+?) -->", svg)


@pytest.fixture(scope="module")
def mixed() -> Model:
    model = Model(name="tiny", module=tiny("llama"))
    ids = torch.randint(0, model.config.vocab_size, (4, 24), generator=torch.Generator().manual_seed(1))
    data = [{"input_ids": part} for part in ids.split(2)]
    change(model, Mixed(bits=3.3, choices=(2, 3, 4, 6), group=32, where=["attn", "mlp", "head"]), Given(data=data))
    return model


def test_every_matrix_has_a_row_with_the_bits_of_its_layer_and_the_harm_that_was_measured(mixed):
    rows = report.bits_by_matrix(mixed)
    assert len(rows) == len(mixed.history[-1]["details"]) == 7 * 4 + 1
    for row in rows:
        path = {"attn.q": "self_attn.q_proj", "mlp.down": "mlp.down_proj"}.get(row["role"])
        if path:
            assert row["bits"] == mixed.module.model.layers[row["block"]].get_submodule(path).bits
        harms = [row["harm"][bits] for bits in (2, 3, 4, 6)]
        assert harms[0] > harms[-1] > 0
    assert next(row for row in rows if row["block"] is None)["role"] == "head"
    assert report.uneven(rows)


def test_the_plot_has_a_panel_of_bits_and_one_of_harm(mixed):
    rows = report.bits_by_matrix(mixed)
    words = texts_in(report.bits_plot(rows))
    assert words.count("block") == 2
    assert "harm of rounding it alone to 2 bits, nats per token" in words
    assert {"attn.q", "attn.v", "mlp.down", "head", "outside", "3"} <= set(words)
    few = [{"role": "attn.q", "block": 0, "bits": 7, "harm": {}}, {"role": "mlp.up", "block": 1, "bits": 5, "harm": {}}]
    words = texts_in(report.bits_plot(few))
    assert words == ["0", "1", "block", "attn.q", "mlp.up", "7", "5", "bits"]  # nothing where there is no matrix


def test_harms_that_no_logarithm_shows_are_left_out():
    def rows(*harms):
        return [{"role": "attn.q", "block": n % 2, "bits": 3 + n % 2, "harm": {2: harm}} for n, harm in enumerate(harms)]

    assert "harm" not in " ".join(texts_in(report.bits_plot(rows(-1e-3, math.inf, 0.0))))
    assert "harm" in " ".join(texts_in(report.bits_plot(rows(1e-3, math.inf, -2e-3))))


def test_what_is_dense_or_alike_has_no_plot():
    for method, bits in ((Magnitude(), set()), (Rtn(group=32), {4}), (Nf4(group=32), {4})):
        model = Model(name="tiny", module=tiny("llama"))
        change(model, method, Given())
        rows = report.bits_by_matrix(model)
        assert {row["bits"] for row in rows} == bits
        assert not report.uneven(rows)


@pytest.mark.parametrize("bits", [4, {"attn": 8, "mlp": [2, 6]}], ids=str)
def test_a_run_draws_the_bits_beside_its_card_where_they_differ(bits, starter, tmp_path):
    done = mw.run("starter", [Rtn(bits=bits, group=32)], save=str(tmp_path / "out"))
    drawn = isinstance(bits, dict)
    assert (done.model.folder / "bits.svg").is_file() == drawn
    assert ("![Bits of each matrix](bits.svg)" in (done.model.folder / "README.md").read_text("utf-8")) == drawn
    if drawn:
        assert {"8", "2", "6"} <= set(texts_in((done.model.folder / "bits.svg").read_text("utf-8")))


def test_the_record_of_a_run_keeps_what_each_matrix_was_given_and_would_lose(starter, tmp_path):
    method = Mixed(bits=3.0, choices=(2, 4), group=32, tries=2, where="mlp")
    done = mw.run("starter", [method], data="corpus", samples=2, length=32, save=str(tmp_path / "out"))
    (step,) = json.loads((done.model.folder / "modelwright.json").read_text("utf-8"))["steps"]
    rows = report.bits_by_matrix(mw.open(done.model.folder))  # from the files
    assert sorted(row["bits"] for row in rows) == sorted(row["bits"] for row in step["details"])
    assert {row["bits"] for row in rows} == {2, 4}
    assert all(set(row["harm"]) == {2, 4} for row in rows)

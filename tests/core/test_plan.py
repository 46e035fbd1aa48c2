"""Predictions: they equal what a run gives, and no weight is read for them."""

from __future__ import annotations

import pytest

import modelwright as mw
from modelwright.core import find, recipe
from modelwright.core.errors import PlanError
from modelwright.core.plan import plan
from modelwright.core.weights import Checkpoint

STEPS = [
    [{"prune.shortgpt": {"blocks": 1}}, {"quantize.gptq": {"bits": 3, "group": 32}}],
    [{"factor.svd_llm": {"keep": 0.6, "where": "mlp"}}, {"quantize.rtn": {"bits": {"mlp": 4, "attn": [8, 4]}, "group": 32}}],
    [{"prune.wanda": {"sparsity": 0.75, "store": "sparse"}}],
    [{"prune.magnitude": {"pattern": "2:4"}}, "factor.svd"],
]


@pytest.mark.parametrize("steps", STEPS, ids=lambda steps: " ".join(map(str, steps))[:40])
def test_predicted_sizes_equal_those_of_the_run(steps, small, text, tmp_path):
    made = recipe.read({"model": str(small), "data": str(text), "samples": 8, "length": 32, "steps": steps, "save": str(tmp_path / "out")})
    predicted = plan(made).rows
    account = mw.run(made).account
    for expected, found in zip(predicted, account, strict=True):
        assert expected.bytes == pytest.approx(found["bytes_memory"], rel=1e-3)
        assert expected.flops_per_token == found["flops_per_token"]
        assert expected.parameters == found["parameters"]


def test_predicted_zeros_equal_those_of_the_run(small, text, tmp_path):
    made = recipe.read({"model": str(small), "steps": [{"prune.magnitude": {"sparsity": 0.3}}], "save": str(tmp_path / "out")})
    assert plan(made).rows[-1].zeros == pytest.approx(mw.run(made).account[-1]["zeros"], rel=1e-3)


def test_no_weight_is_read(small, text, monkeypatch):
    def refuse(*_):
        raise AssertionError("a weight was read")

    monkeypatch.setattr(Checkpoint, "read", refuse)
    found = plan(recipe.read({"model": str(small), "data": str(text), "steps": STEPS[0]}))
    assert [row.step for row in found.rows] == ["input", "prune.shortgpt", "quantize.gptq"]
    assert found.rows[2].bytes < found.rows[0].bytes
    assert all(row.time and row.peak_bytes for row in found.rows[1:])


def test_folding_an_adapter_warns_that_it_fills_zeros(small, text):
    made = recipe.read({"model": str(small), "data": str(text), "steps": ["prune.magnitude", "adapt.lora", "train", "adapt.fold"]})
    assert plan(made).warnings == ["step 3 (adapt.fold) fills in the zeros of step 0 (prune.magnitude)."]


def test_steps_out_of_order_are_all_said(small, text):
    made = recipe.read({"model": str(small), "data": str(text), "steps": ["quantize.rtn", "prune.wanda", "adapt.fold"]})
    with pytest.raises(PlanError, match=r"(?s)2 problems.*step 1: prune.wanda wants.*step 2: adapt.fold wants a model that is adapters"):
        plan(made)


def test_every_method_can_be_planned(small, text):
    for name in find.names():
        cls = find.find(name)
        given = {need: [str(small)] if need == "donors" else "$input" for need in cls.needs() if need in recipe.GIVEN}
        steps = ["adapt.lora"] if "adapters" in cls.wants else []
        found = plan(recipe.read({"model": str(small), "data": str(text), "steps": [*steps, {name: {**cls.small, **given}}]}))
        assert found.rows[-1].step == name

"""Predictions: they equal what a run gives, and no weight is read for them."""

from __future__ import annotations

import shutil
import sys

import pytest
from tiny import tiny
from transformers import LlamaConfig, ResNetConfig, ResNetForImageClassification

import modelwright as mw
from modelwright.core import contract, find, recipe
from modelwright.core.contract import letters
from modelwright.core.data import Text
from modelwright.core.errors import ModelError, PlanError, WeightsError
from modelwright.core.given import Given
from modelwright.core.model import Model, empty_module
from modelwright.core.plan import GATHERED, LOGITS, SOLVING, SURVEYED, TRAINED, peak, plan, seconds, time_class
from modelwright.core.statistics import SAMPLE
from modelwright.core.weights import Checkpoint
from modelwright.methods.encode._mechanism import NUMBA

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


@pytest.mark.parametrize(
    ("step", "form"),
    [
        ("prune.wanda", None),
        ({"prune.flap": {"share": 0.5, "scope": "block"}}, None),
        ({"prune.flap": {"share": 0.5, "scope": "model"}}, "after `import modelwright`"),
        ("factor.svd", "after `import modelwright`"),
        ("quantize.rtn", "in plain transformers with compressed-tensors"),
    ],
)
def test_it_says_what_loads_the_result(step, form, small, text, tmp_path):
    made = recipe.read({"model": str(small), "data": str(text), "samples": 4, "length": 32, "steps": [step], "save": str(tmp_path / "out")})
    notes = [note for row in plan(made).rows for note in row.notes if "loads" in note]
    assert notes == ([f"the result loads {form}"] if form else [])
    mw.run(made)
    stated = Checkpoint(tmp_path / "out").config.get("quantization_config", {"quant_method": None})["quant_method"]
    assert stated == (None if not form else "compressed-tensors" if "compressed" in form else "modelwright")


def test_folding_an_adapter_warns_that_it_fills_zeros(small, text):
    made = recipe.read({"model": str(small), "data": str(text), "steps": ["prune.magnitude", "adapt.lora", "train", "adapt.fold"]})
    assert plan(made).warnings == ["step 3 (adapt.fold) fills in the zeros of step 0 (prune.magnitude)."]


def test_zeros_go_with_the_blocks_that_they_are_in(small, text):
    made = recipe.read({"model": str(small), "data": str(text), "steps": ["prune.magnitude", {"prune.shortgpt": {"blocks": 2}}]})
    _, pruned, shorter = plan(made).rows
    assert shorter.zeros == pytest.approx(pruned.zeros * shorter.parameters / pruned.parameters)
    assert shorter.zeros < pruned.zeros


def test_steps_out_of_order_are_all_said(small, text):
    made = recipe.read({"model": str(small), "data": str(text), "steps": ["quantize.rtn", "prune.wanda", "adapt.fold"]})
    with pytest.raises(PlanError, match=r"(?s)3 problems.*step 1: prune.wanda wants.*step 2: adapt.fold wants a model that is adapters"):
        plan(made)


@pytest.mark.parametrize("name", ["distill.recover", "factor.pela"])
def test_a_teacher_with_another_vocabulary_is_refused(name, small, text, tmp_path):
    Model(name="other", module=tiny("llama", vocab_size=120), tokenizer=letters()).save(tmp_path / "other")
    made = {"model": str(small), "data": str(text), "steps": ["prune.magnitude", {name: {"teacher": str(tmp_path / "other")}}]}
    with pytest.raises(ModelError, match=rf"^step 1: {name}: the teacher's vocabulary has 120 tokens and the model's 97"):
        plan(made)
    Model(name="wide", module=tiny("gpt2"), tokenizer=letters()).save(tmp_path / "wide")
    made["steps"][1] = {"distill.recover": {"teacher": str(tmp_path / "wide")}}
    assert len(plan(made).rows) == 3
    made["steps"][1] = {"distill.recover": {"teacher": str(tmp_path / "none")}}
    with pytest.raises(WeightsError, match="teacher: A checkpoint at .* was asked for") as caught:
        plan(made)
    assert len(caught.value.reasons) == 1


def test_channels_that_cannot_be_mixed_are_refused_before_work(small, text):
    with pytest.raises(PlanError, match=r"^step 0: prune\.pat: no 200 rows of 64 are orthogonal"):
        plan({"model": str(small), "data": str(text), "steps": ["prune.pat"]})


def test_every_method_can_be_planned(small, text, tmp_path):
    most = max(find.find(name).takes[0] for name in find.names())
    others = [str(shutil.copytree(small, tmp_path / f"donor-{number}")) for number in range(most)]
    Model(name="mixture", module=tiny("qwen3_moe"), tokenizer=letters()).save(tmp_path / "mixture")
    small_net = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    Model(name="images", module=ResNetForImageClassification(small_net)).save(tmp_path / "images")
    models = {"prune.reap": tmp_path / "mixture", "prune.precropping": tmp_path / "images"}
    small_module = mw.open(small).module
    for name in find.names():
        cls = find.find(name)
        given = {need: others[: cls.takes[0]] if need == "donors" else "$input" for need in cls.needs() if need in recipe.GIVEN}
        before = {"adapters": "adapt.lora", "packed": "quantize.rtn", "rounding": "quantize.fairy2i"}
        given |= {"sources": list(contract.sources(small_module))} if hasattr(cls, "sources") else {}
        steps = [step for mark, step in before.items() if mark in cls.wants]
        found = plan(
            recipe.read({"model": str(models.get(name, small)), "data": str(text), "steps": [*steps, {name: {**cls.small, **given}}]})
        )
        assert found.rows[-1].step == name


# Memory and time, by arithmetic


WIDTHS = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "vocab_size": 1000, "tie_word_embeddings": False}


def module_of(**changes):
    return empty_module(LlamaConfig(**WIDTHS | {"num_attention_heads": 4, "num_key_value_heads": 2, "dtype": "float32"} | changes))


def given_of(tokens=0, length=128):
    return Given(data=Text(("a" * 100_000,), "text"), samples=tokens // length, length=length)


def peak_of(name, module, tokens=1024, settings=None, **others):
    return peak(module, find.find(name)(**settings or {}), given_of(tokens), 0, **others)


def test_steps_on_tensors_hold_one_tensor_and_the_next_whatever_the_number_of_blocks():
    assert peak_of("prune.magnitude", module_of()) == peak_of("prune.magnitude", module_of(num_hidden_layers=40))
    assert peak_of("prune.magnitude", module_of()) == 64 * 128 * 4 * (2 + find.find("prune.magnitude").holds)


def test_a_survey_of_all_tensors_grows_with_their_number():
    one, two = (peak_of("merge.pcb", module_of(num_hidden_layers=depth)) for depth in (2, 4))
    assert two - one == (module_of(num_hidden_layers=4).num_parameters() - module_of(num_hidden_layers=2).num_parameters()) * SURVEYED


def test_steps_on_layers_hold_what_enters_and_what_leaves_a_block():
    more = peak_of("prune.wanda", module_of(), 4096) - peak_of("prune.wanda", module_of(), 2048)
    assert more == 2 * 2048 * 64 * 4


def test_moments_take_the_squares_of_the_inputs():
    found = peak_of("quantize.gptq", module_of(intermediate_size=4096))
    assert found > 4 * 4096**2 * (GATHERED + SOLVING) > peak_of("prune.wanda", module_of(intermediate_size=4096))


def test_samples_take_the_inputs_of_some_tokens():
    inputs = 64 + 64 + 64 + 128  # of q, k and v; of o; of gate and up; of down
    for tokens, kept in ((256, 256), (4096, 2 * SAMPLE)):
        more = peak_of("quantize.mergequant", module_of(), tokens) - peak_of("quantize.smoothquant", module_of(), tokens)
        assert more == 4 * kept * inputs


def test_training_holds_four_floats_for_a_weight_and_the_logits():
    settings = {"tokens": 256, "batch": 2, "length": 64}
    small_, large = (peak_of("train", module_of(vocab_size=size), settings=settings) for size in (1000, 2000))
    weights = 2 * 1000 * 64
    assert large - small_ == weights * (TRAINED + 1) + 4 * LOGITS * 2 * 64 * 1000
    parts = peak_of("train", module_of(), settings=settings | {"accumulation": 2})
    assert parts < small_


def test_training_with_states_of_8_bits_holds_less():
    settings = {"tokens": 256, "batch": 2, "length": 64}
    exact, companded = (peak_of("train", module_of(), settings=settings | {"optimizer": name}) for name in ("adamw", "coat"))
    weights = sum(value.numel() for value in module_of().parameters())
    assert exact - companded == pytest.approx(weights * (8 - 2 * (1 + 0.75 / 8)), abs=1)


def test_time_grows_with_the_text_and_falls_with_the_rate():
    def lasts(tokens, rate):
        return seconds(module_of(), find.find("quantize.gptq")(), given_of(tokens), 10**9, lambda _: rate)

    assert lasts(2048, 1e9) > 1.9 * lasts(1024, 1e9)
    assert lasts(1024, 1e9) > 5 * lasts(1024, 1e10)


@pytest.mark.parametrize(("lasts", "words"), [(0.1, "a second"), (5, "seconds"), (60, "a minute"), (600, "minutes"), (1e6, "days")])
def test_classes_of_time(lasts, words):
    assert time_class(lasts) == words


def test_a_library_that_a_step_imports_counts_until_it_is_loaded(monkeypatch):
    monkeypatch.delitem(sys.modules, "numba", raising=False)
    before = peak_of("encode.dfloat11", module_of())
    monkeypatch.setitem(sys.modules, "numba", sys)
    assert before - peak_of("encode.dfloat11", module_of()) == NUMBA

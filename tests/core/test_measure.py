"""Measuring: numbers that can be worked out by hand, and what is said where nothing is known."""

from __future__ import annotations

import logging
import math
import sys
import types

import pytest
import torch
from torch import nn

import modelwright as mw
from modelwright.core import data, find, measure
from modelwright.core.contract import LETTERS, letters
from modelwright.core.errors import NeedError
from modelwright.core.model import Model
from modelwright.core.tiny import tiny


class Uniform(nn.Module):
    """Gives every one of 97 tokens the same chance."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.config = type("Config", (), {"vocab_size": 97, "model_type": "none", "max_position_embeddings": 64})()

    def forward(self, input_ids, attention_mask=None, use_cache=False):
        return type("Out", (), {"logits": torch.zeros(*input_ids.shape, 97)})()


def test_uniform_model_has_the_vocabulary_as_perplexity_and_its_logarithm_as_bits():
    text = data.read([LETTERS * 10])
    found = measure.quality(Model(name="uniform", module=Uniform(), tokenizer=letters()), text, length=32)
    assert found["perplexity"] == pytest.approx(97, rel=1e-6)
    assert found["perplexity_low"] == pytest.approx(97, rel=1e-4) == pytest.approx(found["perplexity_high"], rel=1e-4)
    ids = data.tokens(text, letters())
    assert found["tokens"] == len(ids) - 1
    assert found["text"] == "all of the given strings"
    assert found["bits_per_byte"] == pytest.approx((len(ids) - 1) * math.log2(97) / len(LETTERS * 10))


def test_one_window_has_no_interval_and_two_have_that_of_their_means():
    text, tokenizer = data.read([LETTERS]), letters()
    ids = data.tokens(text, tokenizer)
    model = Model(name="m", module=tiny("llama", max_position_embeddings=256), tokenizer=tokenizer)
    whole = measure.quality(model, text, length=len(ids))
    assert whole["perplexity"] > 1
    assert (whole["perplexity_low"], whole["perplexity_high"]) == (None, None)
    found = measure.quality(model, text, length=len(ids) // 2 + 1)
    losses, counts = measure.window_losses(model.module, ids, len(ids) // 2 + 1)
    assert len(counts) == 2
    mean = losses.sum() / counts.sum()
    spread = 1.96 * ((counts / counts.sum()) ** 2 * (losses / counts - mean) ** 2).sum().sqrt()
    assert math.log(found["perplexity_low"]) == pytest.approx(float(mean - spread), rel=1e-4)
    assert math.log(found["perplexity_high"]) == pytest.approx(float(mean + spread), rel=1e-4)


def test_every_token_but_the_first_is_predicted_once_whatever_the_window():
    module = tiny("llama")
    ids = torch.randint(1, 96, (50,), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = module(input_ids=ids[None]).logits[0, :-1]
    whole = nn.functional.cross_entropy(logits, ids[1:], reduction="sum")
    losses, counts = measure.window_losses(module, ids, 64)
    assert counts.tolist() == [49]
    assert losses.sum() == pytest.approx(whole.item(), rel=1e-4)
    losses, counts = measure.window_losses(module, ids, 10)
    assert counts.sum() == 49
    assert counts.tolist() == [9, 9, 9, 9, 9, 4]


def test_counts_of_a_dense_model_are_those_of_its_parameters(small):
    model = mw.open(small)
    on_disk = measure.sizes(model)
    assert not model.loaded, "counting read the whole model"
    module = tiny("llama")
    assert on_disk["parameters"] == sum(value.numel() for value in module.parameters())
    assert on_disk["bytes_memory"] == 4 * on_disk["parameters"]
    assert on_disk["bits_per_weight"] == 32
    _ = model.module
    assert measure.sizes(model) == on_disk


def test_flops_are_two_for_each_weight_of_a_matrix_and_experts_count_by_use():
    module = tiny("llama")
    matrices = sum(layer.weight.numel() for layer in module.modules() if isinstance(layer, nn.Linear))
    assert measure.flops_per_token(module) == 2 * matrices
    sparse = tiny("qwen3_moe")
    experts = sum(value.numel() for name, value in sparse.named_parameters() if "experts" in name)
    others = sum(layer.weight.numel() for layer in sparse.modules() if isinstance(layer, nn.Linear))
    router = sum(value.numel() for name, value in sparse.named_parameters() if name.endswith("mlp.gate.weight"))
    assert measure.flops_per_token(sparse) == 2 * (others + router) + 2 * experts // 4


def test_everything_stored_counts_in_bits_per_weight():
    model = mw.apply(mw.open(tiny("llama").to(torch.bfloat16)), find.find("quantize.rtn")(bits=4, group=32))
    layer = model.module.model.layers[0].mlp.up_proj
    assert layer.stored_bytes() == 160 * 64 // 2 + 160 * 2 * 2 + 16  # codes, scales, shape
    packed = sum(part.weights() for part in model.module.modules() if hasattr(part, "weights"))
    rest = sum(value.numel() for value in model.module.parameters())
    found = measure.sizes(model)
    assert found["parameters"] == packed + rest
    assert found["bits_per_weight"] == pytest.approx(8 * found["bytes_memory"] / (packed + rest))


def test_zeros_of_every_form_are_counted_alike(small, tmp_path):
    counts = []
    for store in ("dense", "sparse"):
        model = mw.apply(small, find.find("prune.magnitude")(sparsity=0.5, store=store), save=tmp_path / store)
        counts.append(measure.sizes(model)["zeros"])
        assert measure.sizes(model)["zeros"] == measure.count(model.module)[1]
    assert counts[0] == counts[1] > 60_000


def test_energy_is_unknown_where_no_counter_is(tmp_path, monkeypatch):
    monkeypatch.setattr(measure.Energy, "folder", tmp_path)
    assert measure.Energy().joules() is None
    counter = tmp_path / "intel-rapl:0"
    counter.mkdir()
    (counter / "energy_uj").write_text("1000000")
    meter = measure.Energy()
    (counter / "energy_uj").write_text("3500000")
    assert meter.joules() == 2.5


def test_a_package_that_is_shown_twice_counts_once(tmp_path, monkeypatch):
    monkeypatch.setattr(measure.Energy, "folder", tmp_path)
    counters = [tmp_path / f"intel-rapl:{number}" / "energy_uj" for number in range(3)]
    for counter, count in zip(counters, (9_000_000, 9_000_100, 50_000_000), strict=True):
        counter.parent.mkdir()
        counter.write_text(str(count))
    meter = measure.Energy()
    for counter, count in zip(counters, (10_000_000, 10_000_100, 52_000_000), strict=True):
        counter.write_text(str(count))
    assert meter.joules() == 3


def test_an_accelerators_own_counter_is_read_and_nothing_is_guessed(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(measure.Energy, "folder", tmp_path)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: types.SimpleNamespace(uuid="12-ab"))
    monkeypatch.setitem(sys.modules, "codecarbon", None)  # as where it is not installed
    assert measure.Energy("cuda").joules() is None
    counts = iter([2000, 5500])

    class Devices:
        def get_gpu_details(self):
            logging.getLogger("codecarbon").error("words that nobody asked for")
            return [{"uuid": "GPU-34", "total_energy_consumption": 1}, {"uuid": "GPU-12-ab", "total_energy_consumption": next(counts)}]

    for name in ("codecarbon", "codecarbon.core", "codecarbon.core.gpu"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules["codecarbon.core.gpu"].AllGPUDevices = Devices
    assert measure.Energy("cuda").joules() == 3.5
    assert capfd.readouterr() == ("", "")


def test_peak_memory_sees_what_is_taken_and_given_back():
    with measure.peak_memory() as meter:
        block = torch.ones(50_000_000)
        del block
    with measure.peak_memory() as smaller:
        pass
    assert meter.bytes - smaller.bytes > 100_000_000


def test_models_are_measured_side_by_side(small, text):
    rows = mw.measure(small, tiny("vit"), data=str(text))
    assert rows[0]["model"] == str(small)
    assert {"perplexity", "bits_per_byte", "prefill_tokens_per_second", "decode_tokens_per_second", "joules_per_token"} <= rows[0].keys()
    assert rows[1]["parameters"] == sum(value.numel() for value in tiny("vit").parameters())
    assert "perplexity" not in rows[1]


def test_tasks_without_lm_eval_say_what_to_install(small, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(NeedError, match="pip install lm-eval"):
        measure.task_scores(mw.open(small), ["arc_easy"])

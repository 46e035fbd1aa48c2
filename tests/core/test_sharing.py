"""Weights that several places share: one tensor in memory, once in the files, through every later step."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from safetensors import safe_open
from torch import nn

import modelwright as mw
from modelwright.core import find, measure, sharing, stream, tiny, walk
from modelwright.core.contract import Case, letters
from modelwright.core.errors import ModelError, ModelwrightError, PlanError, SiteError
from modelwright.core.given import Given
from modelwright.core.model import Model, emptied, open, stored_bytes
from modelwright.core.plan import loads_with, predict

UP = "model.layers.{}.mlp.up_proj.weight"
TIES = {UP.format(2): UP.format(1), UP.format(3): UP.format(1)}


def shared_model(kind="llama", **config) -> Model:
    """Three blocks with one `up`."""
    module = tiny.tiny(kind, **config)
    sharing.tie(module, TIES)
    return Model(name=kind, module=module, tokenizer=letters())


def weights(model: Model) -> list[nn.Parameter]:
    return [model.module.get_parameter(UP.format(depth)) for depth in (1, 2, 3)]


def given() -> Given:
    return Given(data=[tiny.tiny_inputs(tiny.tiny(), seed) for seed in range(3)])


def test_the_architectures_own_ties_are_not_sharing():
    assert sharing.shared(tiny.tiny(tie_word_embeddings=True)) == {}
    assert sharing.shared(tiny.tiny("bert")) == {}
    assert sharing.shared(tiny.tiny("t5")) == {}
    assert sharing.shared(tiny.tiny("mlp")) == {}


def test_gradients_of_all_uses_add_up():
    model = shared_model()
    apart = copy.deepcopy(model.module)
    sharing.untie(apart)
    for module in (model.module, apart):
        module(**tiny.tiny_inputs(module)).logits.square().mean().backward()
    summed = sum(apart.get_parameter(UP.format(depth)).grad for depth in (1, 2, 3))
    assert torch.allclose(weights(model)[0].grad, summed, atol=1e-6)


def test_parameters_and_bytes_count_once_and_flops_at_every_place():
    before, model = tiny.tiny(), shared_model()
    one = 64 * 160
    assert measure.count(model.module)[0] == measure.count(before)[0] - 2 * one
    assert stored_bytes(model.module) == stored_bytes(before) - 2 * 4 * one
    assert measure.flops_per_token(model.module) == measure.flops_per_token(before)
    assert not model.dense
    assert loads_with(model.module) == "after `import modelwright`"


def test_files_hold_a_shared_tensor_once_and_loading_ties_it_again(tmp_path):
    model = shared_model()
    model.save(tmp_path / "one")
    with safe_open(tmp_path / "one" / "model.safetensors", "pt") as file:
        names = set(file.keys())
    assert UP.format(1) in names
    assert not names & set(TIES)
    assert json.loads((tmp_path / "one" / "config.json").read_text())["quantization_config"]["ties"] == TIES
    loaded = open(tmp_path / "one")
    assert weights(loaded)[0] is weights(loaded)[1] is weights(loaded)[2]
    assert torch.equal(tiny.outputs(loaded.module), tiny.outputs(model.module))
    assert sharing.shared(open(tmp_path / "one").skeleton()) == TIES
    assert measure.sizes(open(tmp_path / "one"))["parameters"] == measure.count(model.module)[0]


def test_plain_transformers_loads_it_and_writes_it_again(tmp_path, recwarn):
    from transformers import AutoModelForCausalLM

    model = shared_model()
    model.save(tmp_path / "one")
    plain, found = AutoModelForCausalLM.from_pretrained(tmp_path / "one", output_loading_info=True)
    assert not found["missing_keys"]
    assert not found["unexpected_keys"]
    assert sharing.shared(plain) == TIES
    plain.save_pretrained(tmp_path / "two")
    again = open(tmp_path / "two")
    assert sharing.shared(again.module) == TIES
    assert torch.equal(tiny.outputs(again.module), tiny.outputs(model.module))


def test_untied_it_is_a_dense_model_with_the_same_outputs(tmp_path):
    model = shared_model()
    before = tiny.outputs(model.module)
    sharing.untie(model.module)
    assert model.dense
    assert len({id(weight) for weight in weights(model)}) == 3
    model.save(tmp_path / "plain")
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    assert torch.equal(tiny.outputs(open(tmp_path / "plain").module), before)


@pytest.mark.parametrize("name", ["prune.magnitude", "prune.wanda", "prune.sparsegpt"])
def test_new_values_at_one_place_are_new_values_at_all(name):
    model = shared_model()
    needs = given()
    walk.change(model, find.find(name)(sparsity=0.5, where="mlp.up"), needs)
    one, two, three = weights(model)
    assert one is two is three
    assert (one == 0).float().mean() > 0.45
    assert any("several places share" in note for note in needs.notes) == (name != "prune.magnitude")


FORMS = [
    ("quantize.rtn", {"bits": 4, "group": 32}),
    ("quantize.rtn", {"bits": 4, "symmetric": False}),
    ("quantize.gptq", {"bits": 4}),
    ("prune.magnitude", {"store": "sparse"}),
    ("factor.svd", {}),
]


@pytest.mark.parametrize(("name", "settings"), FORMS, ids=lambda value: value if isinstance(value, str) else "-".join(value) or "none")
def test_another_form_stands_at_all_places_and_is_stored_once(name, settings, tmp_path):
    model, method = shared_model(), find.find(name)(where="mlp.up", **settings)
    with torch.no_grad():
        predicted, _ = predict(emptied(model.module), method, given())
    apart = copy.deepcopy(model.module)
    sharing.untie(apart)
    walk.change(model, method, given())
    layers = [model.module.get_submodule(UP.format(depth).removesuffix(".weight")) for depth in (1, 2, 3)]
    assert len({id(layer) for layer in layers}) == 3
    assert all(torch.equal(layer.dense(), layers[0].dense()) for layer in layers)
    alone = Model(name="alone", module=apart)
    walk.change(alone, method, given())
    each = layers[0].stored_bytes()
    assert stored_bytes(model.module) == stored_bytes(predicted)
    assert abs(stored_bytes(alone.module) - stored_bytes(model.module) - 2 * each) <= (0 if "sparse" not in str(settings) else 400)
    assert measure.flops_per_token(model.module) == measure.flops_per_token(alone.module)
    assert measure.count(model.module)[0] < measure.count(alone.module)[0]
    model.save(tmp_path / "out")
    loaded = open(tmp_path / "out")
    assert torch.allclose(tiny.outputs(loaded.module), tiny.outputs(model.module), atol=1e-5)
    assert stored_bytes(loaded.module) == stored_bytes(model.module)
    assert sharing.shared(loaded.module) == sharing.shared(model.module)


def test_blocks_may_leave_even_the_first_place(tmp_path):
    model = shared_model()
    kept = weights(model)[0].detach().clone()
    mw.anatomy.removal.remove_blocks(model.module, [1])
    assert sharing.shared(model.module) == {UP.format(2): UP.format(1)}
    model.save(tmp_path / "out")
    loaded = open(tmp_path / "out").module
    assert loaded.get_parameter(UP.format(1)) is loaded.get_parameter(UP.format(2))
    assert torch.equal(loaded.get_parameter(UP.format(2)), kept)


@pytest.mark.parametrize("name", ["prune.flap", "prune.llm_pruner", "prune.slicegpt", "prune.adapt_pruner"])
def test_units_do_not_leave_what_is_shared(name):
    with pytest.raises(SiteError, match="remove first, then share"):
        walk.change(shared_model(), find.find(name)(), Case(find.find(name), "llama").given())


def test_every_place_has_an_adapter_of_its_own_which_cannot_be_folded():
    model = shared_model()
    walk.change(model, find.find("adapt.lora")(rank=2, where="mlp.up"), given())
    assert sum("lora_A" in name for name, _ in model.module.named_parameters()) == 4
    assert len(sharing.shared(model.module)) == 2
    with pytest.raises(PlanError, match="adapt.fold: the same tensor stands at"):
        walk.change(model, find.find("adapt.fold")(), Given())
    with pytest.raises(PlanError, match="adapt.fold"):
        predict(emptied(model.module), find.find("adapt.fold")(), Given())


def test_merges_refuse_a_model_that_shares():
    with pytest.raises(ModelError, match="share their weights"):
        walk.change(shared_model(), find.find("merge.linear")(), Given(donors=[Model(name="other", module=tiny.tiny(seed=3))]))


def test_a_model_that_shares_is_not_streamed(tmp_path):
    shared_model().save(tmp_path / "one")
    assert not stream.possible(open(tmp_path / "one"), find.find("prune.wanda")())
    mw.apply(tmp_path / "one", find.find("prune.wanda")(where="mlp.up"), data=given().data, save=tmp_path / "two")
    assert sharing.shared(open(tmp_path / "two").module) == TIES


def test_training_keeps_places_together():
    model = shared_model()
    before = weights(model)[0].detach().clone()
    method = find.find("train")(tokens=64, batch=2, length=16, learning_rate=0.01, warmup=0.0)
    walk.change(model, method, Case(find.find("train"), "llama").given())
    one, two, three = weights(model)
    assert one is two is three
    assert not torch.equal(one, before)


def test_a_broken_tie_is_an_error(tmp_path):
    shared_model().save(tmp_path / "one")
    file = tmp_path / "one" / "config.json"
    file.write_text(file.read_text().replace("model.layers.1.mlp.up_proj.weight", "model.layers.1.mlp.upp_proj.weight"))
    with pytest.raises(ModelwrightError, match="upp_proj"):
        open(tmp_path / "one").module  # noqa: B018

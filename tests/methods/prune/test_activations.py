import copy
import math
import re

import pytest
import torch
from calibration import batches
from tiny import outputs, tiny, tiny_inputs
from transformers import AutoModelForCausalLM

import modelwright as mw
from modelwright.blocks.dropping import Dropping
from modelwright.core.errors import PlanError, SettingError, SiteError
from modelwright.core.gradients import text_loss
from modelwright.core.model import Model
from modelwright.core.observed import inputs_of_modules
from modelwright.methods.adapt.lora import Lora
from modelwright.methods.prune.activations import Activations, matrix
from modelwright.methods.prune.magnitude import Magnitude
from modelwright.methods.quantize.rtn import Rtn


def dropped(module, data=None, **settings):
    """The model, the ratios of its MLPs, and the limit, as the notes say."""
    model = mw.apply(mw.open(module), Activations(**settings), data=data or batches(module))
    note = model.history[-1]["notes"][0]
    ratios = [float(text) for text in note.rpartition(": ")[2].split(", ")]
    return model, ratios, float(re.search(r"at limit ([^;]+);", note)[1])


def sure():
    """A model that is sure of what it predicts, so that text of its own loses by every change."""
    module = tiny()
    with torch.no_grad():
        module.lm_head.weight *= 10
    return module


def own_text(module):
    return [{"input_ids": module.generate(torch.arange(1, 9)[:, None], max_new_tokens=20, do_sample=False)}]


def downs(module):
    return [block.mlp.down_proj for block in module.model.layers]


def real_inputs(model, data):
    """Every input of every down matrix at tokens that are no padding."""
    return list(inputs_of_modules(model, [f"model.layers.{n}.mlp.down_proj" for n in range(4)], data, 10**6).values())


@pytest.mark.parametrize("rule", ["cett", "fat", "top"])
def test_the_perplexity_rises_by_no_more_than_was_allowed_and_almost_by_that(rule):
    module = sure()
    data = own_text(module)
    before = text_loss(mw.open(module), data)
    model = mw.apply(mw.open(module), Activations(increase=0.05, rule=rule, halvings=14), data=data)
    rise = math.exp(text_loss(model, data) - before) - 1
    assert (0.03 if rule == "top" else 0.045) < rise <= 0.05 + 1e-6


def test_the_threshold_of_a_neuron_is_that_of_contributions_over_the_size_of_its_column():
    model, ratios, level = dropped(tiny(), limit=0.3)
    assert level == 0.3
    data = batches(tiny())
    for layer, inputs, after, ratio in zip(
        downs(model.module), real_inputs(mw.open(tiny()), data), real_inputs(model, data), ratios, strict=True
    ):
        norms = layer.weight.detach().norm(dim=0)
        thresholds = layer.dropping.thresholds * norms
        assert torch.allclose(thresholds, thresholds[:1], rtol=1e-5)
        weak = torch.where(inputs.abs() * norms <= thresholds[0] * 1.00001, inputs, 0)
        share = ((weak @ layer.weight.T).norm(dim=1) / (inputs @ layer.weight.T).norm(dim=1)).mean()
        assert 0.29 < share <= 0.301
        assert ratio == pytest.approx(float((after.abs() > layer.dropping.thresholds).float().mean()), abs=1e-4)


def test_zeros_count_as_dropped_by_every_rule_and_one_neuron_stays():
    module = tiny("llama", hidden_act="relu")
    nonzero = [float((x != 0).double().mean()) for x in real_inputs(mw.open(module), batches(module))]
    assert dropped(tiny("llama", hidden_act="relu"), rule="top", limit=0.0)[1] == pytest.approx(nonzero, abs=5e-5)
    assert max(dropped(tiny("llama", hidden_act="relu"), rule="fat", limit=0.0)[1]) < 0.7
    assert dropped(tiny("llama", hidden_act="relu"), rule="top", limit=1.0)[1] == pytest.approx([1 / 160] * 4, abs=5e-5)


def test_of_a_relu_model_only_zeros_drop_where_the_perplexity_may_not_rise():
    module = tiny("llama", hidden_act="relu")
    data = batches(module)
    before, nonzero = outputs(module), [float((x != 0).double().mean()) for x in real_inputs(mw.open(module), data)]
    model, ratios, level = dropped(module, increase=0.0)
    assert level == 0
    assert ratios == pytest.approx(nonzero, abs=5e-5)
    assert 0.3 < min(ratios) <= max(ratios) < 0.7
    assert torch.equal(outputs(model.module), before)


@pytest.mark.parametrize("rule", ["cett", "fat", "top"])
def test_fewer_neurons_stay_where_the_perplexity_may_rise_more(rule):
    means = []
    data = own_text(sure())
    for increase in (0.0, 0.01, 0.1, 1.0):
        _, ratios, _ = dropped(sure(), data, increase=increase, rule=rule, halvings=8)
        means.append(sum(ratios) / 4)
    assert means == sorted(means, reverse=True)
    assert 0 < means[3] < means[2] < means[0] == 1


def test_the_baselines_drop_by_their_own_rules():
    model, ratios, _ = dropped(tiny(), rule="top", limit=0.75)
    assert ratios == [0.25] * 4
    x = torch.tensor([[[3.0, -5, 1, 0]]])
    guest = Dropping(most=2)
    assert guest.kept(x).tolist() == [[[True, True, False, False]]]
    model, ratios, _ = dropped(tiny(), rule="fat", limit=0.05)
    layer = model.module.model.layers[0].mlp
    x = torch.linspace(-3, 3, 50)
    y = torch.nn.functional.silu(x)
    assert torch.equal(layer.act_fn(x), torch.where(y.abs() >= 0.05, y, 0))
    assert not hasattr(layer.down_proj, "dropping")
    assert 0 < ratios[0] < 1


def test_all_mlps_drop_at_once():
    """With every MLP dropping, an MLP in the middle sees what those before it leave."""
    model, _, _ = dropped(tiny(), limit=0.5)
    x = tiny_inputs(tiny())
    expected = copy.deepcopy(tiny())
    for layer, guest in zip(downs(expected), [layer.dropping for layer in downs(model.module)], strict=True):
        layer.register_forward_pre_hook(lambda _, args, t=guest.thresholds: (args[0] * (args[0].abs() > t),))
    assert torch.allclose(outputs(model.module, x), outputs(expected, x), atol=1e-6)
    assert not torch.allclose(outputs(model.module, x), outputs(tiny(), x), atol=1e-3)


def test_padding_counts_neither_in_thresholds_nor_in_ratios():
    module = tiny()
    data = batches(module)
    real = data[0]["attention_mask"].bool()
    found = inputs_of_modules(mw.open(module), ["model.layers.0.mlp.down_proj"], data, 10**6)["model.layers.0.mlp.down_proj"]
    assert len(found) == 3 * int(real.sum())
    few = inputs_of_modules(mw.open(module), ["model.layers.0.mlp.down_proj"], data, 10)["model.layers.0.mlp.down_proj"]
    assert len(few) == 10
    assert torch.equal(few[0], found[0])
    assert torch.equal(few[-1], found[-1])


@pytest.mark.parametrize(("kind", "settings"), [("llama", {}), ("gpt2", {}), ("gpt2", {"rule": "fat"}), ("opt", {"rule": "fat"}),
                                                ("phi3", {"rule": "top"}), ("gemma2", {}), ("gpt_neox", {})])  # fmt: skip
def test_it_is_saved_and_loads_after_the_import(kind, settings, tmp_path):
    module = tiny(kind)
    before = outputs(module)
    model = mw.apply(mw.open(module), Activations(increase=0.05, halvings=4, **settings), data=batches(module))
    found = outputs(model.module)
    assert not torch.equal(found, before)
    assert torch.equal(outputs(copy.deepcopy(model.module)), found)
    model.save(tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert torch.equal(outputs(again), found)
    assert Model(name="", module=again).marks == set()
    names = {name for name in model.module.state_dict() if "dropping" not in name}
    assert names == set(tiny(kind).state_dict())


def test_packed_matrices_may_drop_neurons(tmp_path):
    model = mw.apply(mw.open(tiny()), [Rtn(bits=8), Activations(limit=0.3)], data=batches(tiny()))
    model.save(tmp_path / "out")
    assert torch.allclose(outputs(mw.open(tmp_path / "out").module), outputs(model.module), atol=1e-5)
    packed = mw.open(tmp_path / "out").module.model.layers[0].mlp.down_proj
    assert type(packed).__name__ == "PackedLinear"
    assert packed.dropping.thresholds.shape == (160,)


def test_a_guest_that_leaves_leaves_no_trace():
    module = tiny()
    before = outputs(module)
    guest = Dropping(most=3)
    guest.join(module.model.layers[0].mlp.down_proj, "dropping")
    assert not torch.equal(outputs(module), before)
    with pytest.raises(AssertionError, match="a Linear has a guest already"):
        Dropping(most=3).join(module.model.layers[0].mlp.down_proj, "another")
    guest.leave()
    assert torch.equal(outputs(module), before)
    assert module.state_dict().keys() == tiny().state_dict().keys()


def test_what_cannot_be_done_is_refused():
    data = batches(tiny())
    with pytest.raises(SettingError, match="limit is a share with these rules, and above 1"):
        Activations(limit=1.5)
    with pytest.raises(SiteError, match=r"this model has no mlp\.down"):
        mw.apply(tiny("qwen3_moe"), Activations(), data=data)
    module = tiny()
    for block in module.model.layers:
        block.mlp.other = torch.nn.ReLU()
    with pytest.raises(SiteError, match="laid out otherwise than with one activation function"):
        mw.apply(module, Activations(rule="fat"), data=data)
    model, _, _ = dropped(tiny(), limit=0.1)
    with pytest.raises(PlanError, match="drops neurons already"):
        mw.apply(model, Activations(), data=data)
    with pytest.raises(PlanError, match=r"prune\.magnitude wants a model that is float"):
        mw.apply(model, Magnitude(sparsity=0.5))
    with pytest.raises(PlanError, match="bears an adapter"):
        mw.apply(mw.open(tiny()), [Lora(rank=2), Activations()], data=data)
    with pytest.raises(TypeError, match="one of features, most and least"):
        Dropping(most=1, least=0.1)


def test_matrices_are_read_however_they_are_stored():
    packed = mw.apply(tiny(), Rtn(bits=8))
    for module, path in ((packed, "model.layers.0.mlp.down_proj"), (tiny("gpt2"), "transformer.h.0.mlp.c_proj")):
        layer, found = module.get_submodule(path), matrix(module, path)
        x = torch.randn(3, found.shape[1], generator=torch.Generator().manual_seed(0))
        bias = 0 if layer.bias is None else layer.bias
        assert torch.allclose(x @ found.T + bias, layer(x), atol=1e-4)


def test_thresholds_that_nothing_passes_are_finite_in_the_file():
    guest = Dropping(features=3)
    guest.set_thresholds(torch.tensor([torch.inf, 1.0, 0.0]))
    assert guest.thresholds.isfinite().all()
    assert guest.kept(torch.tensor([1e30, 2.0, 0.5])).tolist() == [False, True, True]


def test_every_activation_may_drop_where_the_perplexity_may_rise_without_end():
    _, ratios, level = dropped(tiny(), increase=1e9, rule="fat")
    inputs = inputs_of_modules(mw.open(tiny()), [f"model.layers.{n}.mlp.act_fn" for n in range(4)], batches(tiny()), 10**6).values()
    assert level == pytest.approx(max(float(torch.nn.functional.silu(x).abs().max()) for x in inputs), rel=1e-4)
    assert max(ratios) < 0.01

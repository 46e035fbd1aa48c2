import copy

import pytest
import torch
from calibration import batches, correlated, gathered, normal
from tiny import outputs, tiny

import modelwright as mw
from modelwright.anatomy import anatomy_of
from modelwright.core.errors import SettingError
from modelwright.core.model import Model
from modelwright.core.passage import statistics_of
from modelwright.methods.prune._units import last_matrix
from modelwright.methods.prune.flap import Flap


def error(inputs, weight, removed, constant):
    """Mean square distance of a matrix's outputs when inputs are replaced by constants."""
    less = inputs.clone()
    less[:, removed] = constant
    return ((inputs - less) @ weight.T).square().sum(1).mean()


@pytest.mark.parametrize("channel", [0, 3, 7])
def test_the_score_of_a_channel_is_the_error_that_its_mean_leaves(channel):
    inputs, weight = correlated(200, 8) + torch.arange(8.0), normal(5, 8)
    statistics = gathered(inputs, "variance")
    score = Flap().channels(weight, statistics)[channel]
    mean = statistics.mean[channel]
    left = error(inputs, weight, channel, mean)
    assert score == pytest.approx(left.item(), rel=1e-4)
    without = error(inputs, weight, channel, 0.0)
    assert without == pytest.approx((left + mean**2 * weight[:, channel].square().sum()).item(), rel=1e-4)


def test_variances_of_parts_join_to_that_of_the_whole():
    inputs = correlated(50, 6) + 1000 * torch.arange(6)  # far from 0, where E[x²] - mean² would be lost
    parts = gathered(inputs[:7], "variance")
    for start, stop in ((7, 8), (8, 8), (8, 50)):
        parts.add(inputs[start:stop])
    assert torch.allclose(parts.variance, inputs.double().var(0, unbiased=False).float(), rtol=1e-3)
    assert torch.allclose(parts.mean, inputs.mean(0), rtol=1e-5)


def test_a_case_by_hand():
    # Inputs (1, 0), (3, 4): variances 1, 4; norms √5, √8. Columns of W: (1, 2) and (0, -1): squares 5, 1, means of sizes 1.5, 0.5.
    statistics = gathered(torch.tensor([[1.0, 0.0], [3.0, 4.0]]), "variance", "norm")
    weight = torch.tensor([[1.0, 0.0], [2.0, -1.0]])
    assert Flap(measure="fluctuation").channels(weight, statistics).tolist() == [5.0, 4.0]
    assert Flap(measure="variance").channels(weight, statistics).tolist() == [1.0, 4.0]
    assert Flap(measure="size").channels(weight, statistics).tolist() == pytest.approx([1.5 * 5**0.5, 0.5 * 8**0.5])


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2", "gpt2", "bert", "phi3", "mistral", "vit"])
@pytest.mark.parametrize("scope", ["block", "model"])
def test_what_leaves_is_replaced_by_its_mean(name, scope, tmp_path):
    """The pruned model computes what the whole one does whose units that left always give their mean."""
    module = tiny(name)
    data = batches(module)
    expected = copy.deepcopy(module)
    model = mw.apply(Model(name=name, module=module), Flap(share=0.3, scope=scope), data=data)
    before = {units.scope: units for kind in ("mlp", "heads") for units in anatomy_of(expected).units(expected, kind)}
    after = {units.scope: units for kind in ("mlp", "heads") for units in anatomy_of(module).units(module, kind)}
    assert any(after[scope_].count < units.count for scope_, units in before.items())
    sites = [last_matrix(expected, units) for units in before.values()]
    means = {site.module: found.mean for site, found in zip(sites, statistics_of(
        Model(name="", module=expected), sites, ("mean",), data).values(), strict=True)}  # fmt: skip
    for units, site in zip(before.values(), sites, strict=True):
        span = next(span for span in units.spans if span.output)
        old = expected.get_parameter(site.name).movedim(span.dim, 0).reshape(units.count, -1)
        new = module.get_parameter(site.name).movedim(span.dim, 0).reshape(after[units.scope].count, -1)
        stays = torch.tensor([bool((new == row).all(1).any()) for row in old]).repeat_interleave(span.width)
        mean = means[site.module]
        expected.get_submodule(site.module).register_forward_pre_hook(
            lambda _, args, stays=stays, mean=mean: (torch.where(stays, args[0], mean.to(args[0])),)
        )
    assert torch.allclose(outputs(module), outputs(expected), atol=2e-5)
    model.save(tmp_path / "out")
    assert torch.equal(outputs(type(module).from_pretrained(tmp_path / "out").eval()), outputs(module))


def test_a_constant_unit_leaves_without_a_trace():
    module = tiny("llama", mlp_bias=True)
    with torch.no_grad():
        for block in module.model.layers:
            for layer in (block.mlp.gate_proj, block.mlp.up_proj):
                layer.weight[:16] = 0
                layer.bias[:16] = 1.5
    before = outputs(module)
    mw.apply(module, Flap(share=0.1, units=("mlp",), scope="block"), data=batches(module))
    assert [block.mlp.up_proj.out_features for block in module.model.layers] == [144] * 4
    assert torch.allclose(outputs(module), before, atol=1e-5)


def test_one_share_for_all_blocks_loads_in_plain_transformers_and_another_after_the_import(tmp_path):
    for scope, plain in (("block", True), ("model", False)):
        model = mw.apply(mw.open(tiny("llama")), Flap(share=0.5, scope=scope), data=batches(tiny("llama")))
        model.save(tmp_path / scope)
        stated = mw.open(tmp_path / scope).config
        assert hasattr(stated, "quantization_config") is not plain
        assert (not model.history[-1]["notes"]) is plain
        assert stated.attention_bias is stated.mlp_bias is True


def test_without_a_bias_and_by_size_it_is_wanda_for_units():
    module = tiny("llama")
    mw.apply(module, Flap(share=0.5, scope="block", measure="size", bias=False), data=batches(module))
    assert module.model.layers[0].mlp.down_proj.bias is None
    assert module.model.layers[0].self_attn.k_proj.weight.shape == (16, 64)


def test_units_that_write_through_no_one_matrix_are_refused():
    with pytest.raises(SettingError, match="units are mlp and heads, which write through one matrix; got residual"):
        Flap(units=("mlp", "residual"))
    with pytest.raises(SettingError, match="units are some of mlp, heads, residual, experts, channels, stages; got neurons"):
        Flap(units=("neurons",))


@pytest.mark.parametrize("scope", ["block", "model"])
def test_heads_are_squared_and_layers_brought_to_one_scale(scope):
    module = tiny("llama")
    method = Flap(scope=scope)
    found = method.found(module)
    seen = method.look(Model(name="", module=module), found, batches(module))
    for units, score, (site, statistics) in zip(found, method.scores(module, found, seen), seen, strict=True):
        channels = (statistics.variance * module.get_parameter(site.name).detach().square().sum(0)).double()
        channels = channels.square() if units.kind == "heads" else channels
        if scope == "model":
            channels = (channels - channels.mean()) / channels.std()
        assert torch.allclose(score.double(), channels.view(units.count, -1).mean(1), rtol=1e-4, atol=1e-9)

import copy

import pytest
import torch
from calibration import batches, correlated, cost, damped, gathered, normal, with_moment
from tiny import outputs, tiny

import modelwright as mw
from modelwright.core.errors import SiteError
from modelwright.core.given import Given
from modelwright.core.model import Model
from modelwright.core.plan import plan
from modelwright.core.recipe import Step
from modelwright.core.walk import change
from modelwright.maths import second_order
from modelwright.maths.rounding import decode, encode
from modelwright.methods.prune.magnitude import Magnitude
from modelwright.methods.quantize.gptq import Gptq
from modelwright.methods.quantize.rtn import Rtn

WEIGHT = normal(24, 128)
SEEN = gathered(correlated(400, 128))
KINDS = [
    {"bits": 4, "group": 32},
    {"bits": 3, "group": 0},
    {"bits": 2, "group": 64, "symmetric": False},
    {"bits": 3, "group": 32, "search": True},
]


def test_a_case_by_hand():
    # Inputs (√2, √2), (√2, 0): H = [[2, 1], [1, 1]], H⁻¹ = [[1, -1], [-1, 2]] = UᵀU with U = [[1, -1], [0, 1]].
    # The scale of [2.4, -7.5] is 7.5/7.5 = 1. Column 0: q = 2, e = 0.4/1; column 1 becomes -7.5 + 0.4 = -7.1, q = -7.
    # By itself -7.5 would go to -8 (to even). Loss e² = 0.16 + 0.01, and tr(ΔHΔᵀ) with Δ = (0.4, -0.5) is
    # 2·0.16 - 2·0.2 + 0.25 = 0.17 too; of rounding, with Δ = (0.4, 0.5), it is 0.97.
    statistics = gathered(torch.tensor([[2.0, 2.0], [2.0, 0.0]]).sqrt())
    weight = torch.tensor([[2.4, -7.5]])
    result = Gptq(bits=4, group=0, damp=0).layer(weight, statistics).dense()
    assert result.tolist() == [[2.0, -7.0]]
    assert cost(weight, result, statistics.moment) == pytest.approx(0.17, rel=1e-4)
    rounded = Rtn(bits=4, group=0).tensor(weight).dense()
    assert rounded.tolist() == [[2.0, -8.0]]
    assert cost(weight, rounded, statistics.moment) == pytest.approx(0.97, rel=1e-4)


@pytest.mark.parametrize("settings", KINDS)
@pytest.mark.parametrize("order", [False, True])
@pytest.mark.parametrize("size", [1e-3, 1.0, 40.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_with_identity_moment_it_is_rounding_bit_for_bit(settings, order, size, dtype):
    ours = Gptq(**settings, order=order).layer(WEIGHT.to(dtype), gathered(size * torch.eye(128)))
    theirs = Rtn(**settings).tensor(WEIGHT.to(dtype))
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    for name, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value), name


@pytest.mark.parametrize("settings", KINDS)
@pytest.mark.parametrize("order", [False, True])
@pytest.mark.parametrize("damp", [0.01, 0.1])
def test_the_sum_of_its_errors_is_exactly_what_the_outputs_lose(settings, order, damp, monkeypatch):
    losses = []
    sweep = second_order.sweep
    monkeypatch.setattr(second_order, "sweep", lambda *args, **kwargs: losses.append(sweep(*args, **kwargs)) or losses[-1])
    result = Gptq(**settings, order=order, damp=damp).layer(WEIGHT, SEEN).dense()
    assert losses[0][1] == pytest.approx(cost(WEIGHT, result, damped(SEEN.moment, damp)), rel=2e-4)


@pytest.mark.parametrize("settings", KINDS)
@pytest.mark.parametrize("order", [False, True])
def test_it_is_the_published_algorithm(settings, order):
    """Column by column in float64: scales of the original weight, e = (w - q) / U_jj, and W[:, j:] -= e U[j, j:]."""
    plain = Rtn(**settings).tensor(WEIGHT)
    scale, zero = plain.weight_scale, plain.zero()
    places = SEEN.moment.diagonal().argsort(descending=True) if order else torch.arange(128)
    moment = damped(SEEN.moment)[places][:, places]
    upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(moment)), upper=True)
    current, result = WEIGHT.double()[:, places], torch.empty_like(WEIGHT)
    for j, place in enumerate(places.tolist()):
        group = place // (128 // scale.shape[1])
        own = scale[:, group : group + 1], None if zero is None else zero[:, group : group + 1]
        codes = encode(current[:, j : j + 1].float(), *own, settings["bits"])
        result[:, place : place + 1] = decode(codes, *own)
        error = (current[:, j] - result[:, place]) / upper[j, j]
        current[:, j:] -= error[:, None] * upper[j, j:]
    ours = Gptq(**settings, order=order).layer(WEIGHT, SEEN).dense()
    assert (ours != result).float().mean() < 0.002  # float32 may tip a weight that lies half way
    assert cost(WEIGHT, ours, SEEN.moment) == pytest.approx(cost(WEIGHT, result, SEEN.moment), rel=0.01)


@pytest.mark.parametrize("symmetric", [True, False])
def test_on_correlated_inputs_it_loses_less_than_rounding_and_less_still_in_order(symmetric):
    settings = {"bits": 3, "group": 32, "symmetric": symmetric}
    plain = cost(WEIGHT, Rtn(**settings).tensor(WEIGHT).dense(), SEEN.moment)
    swept = cost(WEIGHT, Gptq(**settings).layer(WEIGHT, SEEN).dense(), SEEN.moment)
    ordered = cost(WEIGHT, Gptq(**settings, order=True).layer(WEIGHT, SEEN).dense(), SEEN.moment)
    assert ordered < 0.7 * swept < 0.6 * plain


@pytest.mark.parametrize("order", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scales_are_those_of_the_original_groups_in_the_dtype_that_is_stored(order, dtype):
    weight = WEIGHT.to(dtype)
    layer = Gptq(bits=4, group=32, order=order).layer(weight, SEEN)
    assert layer.weight_scale.dtype == dtype
    assert torch.equal(layer.weight_scale, Rtn(bits=4, group=32).tensor(weight).weight_scale)
    assert torch.equal(layer.weight_scale, (weight.float().view(24, 4, 32).abs().amax(-1) / 7.5).to(dtype))


def test_blocks_of_columns_change_nothing_but_rounding():
    results = [Gptq(bits=3, group=32, columns=size).layer(WEIGHT, SEEN).dense() for size in (16, 100, 128, 1000)]
    for result in results:
        assert (result != results[0]).float().mean() < 0.005


@pytest.mark.parametrize("settings", [*KINDS, {"grid": "nf4", "group": 32}, {"grid": "nvfp4", "group": 16}])
@pytest.mark.parametrize("order", [False, True])
def test_weights_that_are_zero_stay_so_and_their_columns_errors_are_passed_on(settings, order):
    keep = WEIGHT.view(24, 32, 4).abs().argsort(-1).argsort(-1).ge(2).view(24, 128)
    pruned = WEIGHT * keep
    layer = Gptq(**settings, order=order).layer(pruned, SEEN)
    assert not layer.dense()[~keep].any()
    assert cost(pruned, layer.dense(), SEEN.moment) < cost(pruned, Rtn(**settings).tensor(pruned).dense(), SEEN.moment)


@pytest.mark.parametrize("grid", ["k-means", "odd"])
def test_a_grid_without_zero_says_that_it_fills_zeros(grid):
    assert "sparse" in Gptq(grid=grid, group=32).lost()
    assert "sparse" not in Gptq(group=32).lost()
    half = WEIGHT * (torch.arange(128) % 2)
    assert Gptq(grid=grid, group=32).layer(half, SEEN).dense()[:, ::2].any()
    recipe = mw.Recipe(model="starter", data="corpus", steps=(Step(Magnitude()), Step(Gptq(grid=grid))))
    assert plan(recipe).warnings == ["step 1 (quantize.gptq) fills in the zeros of step 0 (prune.magnitude)."]


def test_columns_that_no_input_reaches_become_zero():
    inputs = correlated(400, 128)
    inputs[:, [3, 40]] = 0
    result = Gptq(group=32).layer(WEIGHT, gathered(inputs)).dense()
    assert (result[:, [3, 40]] == 0).all()


@pytest.mark.parametrize("damp", [0.0, 0.01])
def test_fewer_tokens_than_inputs_are_enough(damp):
    statistics = gathered(correlated(5, 128))
    result = Gptq(group=32, damp=damp).layer(WEIGHT, statistics).dense()
    assert result.isfinite().all()
    assert cost(WEIGHT, result, statistics.moment) < cost(WEIGHT, Rtn(group=32).tensor(WEIGHT).dense(), statistics.moment)


def test_a_moment_that_cannot_be_used_is_refused_with_advice():
    indefinite = torch.tensor([[1.0, 1e9], [1e9, 1.0]])
    with pytest.raises(SiteError, match=r"has no inverse.*Give more calibration text, or leave the layer out with `skip`"):
        Gptq().layer(torch.ones(1, 2), with_moment(indefinite))
    with pytest.raises(SiteError, match=r"not finite.*wider dtype"):
        Gptq().layer(torch.ones(1, 2), with_moment(torch.full((2, 2), torch.nan)))


def test_moments_add_up_in_float32():
    inputs = correlated(4000, 16).bfloat16()
    assert gathered(inputs).moment.dtype == torch.float32
    exact = inputs.double().T @ inputs.double() / 4000
    assert torch.allclose(gathered(inputs).moment.double(), exact, rtol=1e-4, atol=1e-5)


def test_experts_without_tokens_are_rounded():
    model, before = Model(name="tiny", module=tiny("mixtral")), tiny("mixtral")
    change(model, Gptq(bits=4, group=32), Given(data=[{"input_ids": torch.tensor([[5, 9]])}]))
    idle = [note for note in model.history[-1]["notes"] if "layers.0.mlp.experts." in note and "down_proj saw no" in note]
    assert idle
    number = int(idle[0].partition("experts.")[2].partition(".")[0])
    ours = model.module.model.layers[0].mlp.experts[number].down_proj.dense()
    assert torch.equal(ours, Rtn(bits=4, group=32).tensor(before.model.layers[0].mlp.experts.down_proj.data[number]).dense())


@pytest.mark.parametrize("stages", [False, True])
def test_statistics_come_from_the_layers_that_are_already_quantised(stages):
    """Those of the blocks before, and with `stages` those of the same block that come first."""
    before, method = tiny(), Gptq(bits=3, group=32, stages=stages)
    data = batches(before)
    after = mw.apply(copy.deepcopy(before), method, data=data)
    half = copy.deepcopy(before)
    half.model.layers[0] = after.model.layers[0]
    attention = half.model.layers[1].self_attn
    if stages:
        for name in ("q_proj", "k_proj", "v_proj"):
            attention.set_submodule(name, after.model.layers[1].self_attn.get_submodule(name))
    seen = []
    attention.o_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    for batch in data:
        half(**batch)
    real = torch.cat([x[batch["attention_mask"].bool()] for x, batch in zip(seen, data, strict=True)])
    expected = method.layer(attention.o_proj.weight.detach(), gathered(real)).codes()
    assert torch.equal(after.model.layers[1].self_attn.o_proj.codes(), expected)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_model_keeps_more_of_its_outputs_than_by_rounding(kind):
    before = tiny(kind)
    expected, data = outputs(before), batches(before, 8)
    swept = outputs(mw.apply(tiny(kind), Gptq(bits=3, group=32), data=data))
    rounded = outputs(mw.apply(tiny(kind), Rtn(bits=3, group=32)))
    assert (swept - expected).norm() < (rounded - expected).norm()

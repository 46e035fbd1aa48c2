import copy

import pytest
import torch
from calibration import batches, correlated, cost, gathered, normal
from tiny import outputs, tiny

from modelwright.anatomy import anatomy_of
from modelwright.core.given import Given
from modelwright.core.model import Model
from modelwright.core.statistics import Statistics
from modelwright.core.walk import change
from modelwright.maths.grids import nearest
from modelwright.methods.quantize.awq import Awq
from modelwright.methods.quantize.rtn import Rtn

WEIGHT = normal(24, 128)


def seen(inputs):
    statistics = Statistics(inputs.shape[1], Awq.gathers)
    statistics.add(inputs)
    return statistics


def uneven():
    inputs = correlated(400, 128)
    inputs[:, [5, 60]] *= 30
    return inputs


def rescaled(method, inputs, weight=WEIGHT):
    """The factor, and the squares of the outputs' errors with and without it."""
    tried = []

    def harm(weights):
        error = float((inputs @ (weights[0] - weight).T).square().mean())
        tried.append(error)
        return error

    return method.rescale("norm", [(method, weight)], seen(inputs), harm), tried


def test_a_case_by_hand():
    # Mean sizes 4 and 1 of two inputs. With two points of the grid r is 0 or 0.5: s = (1, 1), or (2, 1)/sqrt(2 * 1).
    # The error of rounding is made small for the second alone, so that it is taken.
    inputs = torch.tensor([[4.0, 1.0], [-4.0, 1.0]])
    factors = []
    method = Awq(bits=4, group=0, points=2)
    weight = torch.tensor([[1.0, 0.5]])

    def harm(weights):
        factors.append(weights)
        return 2.0 - len(factors)

    found = method.rescale("norm", [(method, weight)], seen(inputs), harm)
    assert torch.allclose(found, torch.tensor([2.0, 1.0]) / 2**0.5)
    assert torch.equal(factors[0][0], nearest(weight, method.fitted(weight)))


def test_on_uneven_inputs_the_scaled_weights_lose_less_and_never_more_than_rounding():
    factor, tried = rescaled(Awq(bits=3, group=32), uneven())
    assert tried[0] == pytest.approx(float((uneven() @ (nearest(WEIGHT, Awq(bits=3, group=32).fitted(WEIGHT)) - WEIGHT).T).square().mean()))
    assert min(tried) < 0.7 * tried[0]
    assert factor.max() * factor.min() == pytest.approx(1, rel=1e-4)
    assert factor.argmax() in (5, 60)


def test_clipping_takes_for_each_group_the_range_with_the_least_error_of_its_outputs():
    inputs, method = correlated(500, 128), Awq(bits=3, group=32, narrow=0.5)
    statistics = seen(inputs)
    weight = WEIGHT.clone()
    weight[3, 40] = 9.0
    clipped = method.clipped(weight, statistics.moment)
    ratio = clipped.view(24, 4, 32).abs().amax(-1) / weight.view(24, 4, 32).abs().amax(-1)
    steps = (1 - ratio) * 20
    assert torch.allclose(steps, steps.round(), atol=1e-3)
    assert steps.min() >= 0
    assert steps.max() <= 9

    def error(bound):
        tried = weight.view(24, 4, 32).clamp(-bound, bound).view(weight.shape)
        apart = nearest(tried, method.fitted(tried)) - weight
        return torch.stack([(inputs[:, 32 * g : 32 * g + 32] @ apart[:, 32 * g : 32 * g + 32].T).square().mean(0) for g in range(4)], 1)

    largest = weight.view(24, 4, 32).abs().amax(-1, keepdim=True)
    every = torch.stack([error(largest * (1 - step / 20)) for step in range(10)])
    chosen = error(clipped.view(24, 4, 32).abs().amax(-1, keepdim=True))
    assert torch.allclose(chosen, every.amin(0), rtol=1e-3)


def test_without_scaling_and_clipping_it_is_rounding():
    statistics = seen(correlated(100, 128))
    ours = Awq(bits=4, group=32, narrow=0.0).layer(WEIGHT, statistics)
    assert torch.equal(ours.dense(), Rtn(bits=4, group=32, symmetric=False).tensor(WEIGHT).dense())


def test_queries_and_keys_are_not_clipped():
    assert Awq().at("attn.q", 0, 4).narrow == 0
    assert Awq().at("attn.k", 3, 4).narrow == 0
    assert Awq().at("attn.v", 0, 4).narrow == 0.5


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_of_a_whole_model_the_outputs_lose_less_than_by_rounding(kind):
    model = tiny(kind)
    data = batches(model)
    exact = outputs(model)

    def lost(method):
        changed = Model(name="tiny", module=copy.deepcopy(model))
        change(changed, method, Given(data=data))
        return float((outputs(changed.module) - exact).square().mean())

    assert lost(Awq(bits=3, group=32)) < lost(Rtn(bits=3, group=32, symmetric=False))


def test_statistics_follow_the_factor():
    inputs, factor = uneven(), torch.rand(128) + 0.5
    scaled, fresh = seen(inputs), seen(inputs / factor)
    scaled.rescale(1 / factor)
    assert torch.allclose(scaled.absolute, fresh.absolute, rtol=1e-5)
    assert torch.allclose(scaled.moment, fresh.moment, rtol=1e-4, atol=1e-3)
    every = Statistics(128, ("norm", "variance", "largest"))
    every.add(inputs)
    every.rescale(1 / factor)
    again = Statistics(128, ("norm", "variance", "largest"))
    again.add(inputs / factor)
    for name in ("norm", "mean", "variance", "largest"):
        assert torch.allclose(getattr(every, name), getattr(again, name), rtol=1e-4, atol=1e-5), name


def test_the_cost_of_one_matrix_falls_with_its_factor():
    factor, _ = rescaled(Awq(bits=3, group=32), uneven())
    inputs = gathered(uneven())
    scaled = nearest(WEIGHT * factor, Awq(bits=3, group=32).fitted(WEIGHT * factor)) / factor
    plain = nearest(WEIGHT, Awq(bits=3, group=32).fitted(WEIGHT))
    assert cost(WEIGHT, scaled, inputs.moment) < 0.7 * cost(WEIGHT, plain, inputs.moment)


def test_each_matrix_that_shares_inputs_is_rounded_with_its_own_settings():
    coarse, fine, tried = Awq(bits=2, group=32, points=1), Awq(bits=8, group=32, points=1), []
    fine.rescale("norm", [(fine, WEIGHT), (coarse, WEIGHT)], seen(uneven()), lambda weights: tried.append(weights) or 0.0)
    assert [len(weight[0, :32].unique()) <= 4 for weight in tried[0]] == [False, True]


def test_rows_are_clipped_by_themselves_however_many_there_are():
    statistics, method, weight = seen(correlated(200, 64)), Awq(bits=3, group=32, narrow=0.5), normal(600, 64)
    whole = method.clipped(weight, statistics.moment)
    assert torch.allclose(whole[300:310], method.clipped(weight[300:310], statistics.moment))


def test_it_takes_the_other_grids_too():
    layer = Awq(grid="nf4", group=32, nested=True, narrow=0.5).layer(WEIGHT, seen(correlated(100, 128)))
    assert layer.describe()["levels"] == "nf4"


@pytest.mark.parametrize(
    ("kind", "clipped"), [("llama", {"v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}), ("gpt2", {"c_proj", "c_fc"})]
)
def test_queries_and_keys_are_not_clipped_nor_what_is_one_matrix_with_them(kind, clipped):
    module = tiny(kind)
    sites = anatomy_of(module).sites(module)
    found = {
        site.module.rpartition(".")[2] for site in sites if site.role != "head" and Awq().at(site.role, site.depth, site.depths).narrow
    }
    assert found - {"wte", "wpe", "embed_tokens"} == clipped

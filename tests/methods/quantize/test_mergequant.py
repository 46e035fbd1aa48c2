import copy

import pytest
import torch
from calibration import batches, gathered, normal
from tiny import outputs, tiny

from modelwright.blocks.static import StaticLinear
from modelwright.core.given import Given
from modelwright.core.model import Model
from modelwright.core.statistics import SAMPLE
from modelwright.core.walk import change
from modelwright.maths.static_inputs import reconstruction, rounded, steps
from modelwright.methods.quantize.mergequant import MergeQuant


def far_out(tokens=200, width=64):
    inputs = normal(tokens, width, seed=1)
    inputs[:, [3, 17]] *= 40
    return inputs


def merged(method, weight, inputs):
    """The layer for a weight and inputs that a norm makes, and the factor that goes from the norm into the weight."""
    statistics = gathered(inputs, *MergeQuant.gathers)
    factor = method.rescale("norm", [(method, weight)], statistics, None)
    statistics.rescale(1 / factor)
    return method.layer(weight * factor, statistics), factor


def test_a_case_by_hand():
    # Ranges 14 and 7 in 4 bits: steps 2 and 1, inputs 6 and 3 are 3 and 3 of them, the merged weights 2 and 2 are codes 7 and 7.
    inputs = torch.tensor([[14.0, 7.0], [6.0, 3.0]])
    layer, factor = merged(MergeQuant(), torch.tensor([[1.0, 2.0]]), inputs)
    assert factor.tolist() == [2.0, 1.0]
    assert layer.codes().tolist() == [[7, 7]]
    assert layer.input_step is None
    assert (layer(inputs / factor)).flatten().tolist() == pytest.approx([28.0, 12.0])


def test_steps_go_from_the_inputs_into_the_weight():
    inputs, weight = far_out(), normal(32, 64)
    step = steps(inputs.abs().amax(0), 1.0, 4)
    numbers = rounded(inputs / step, 4)
    one, two = (numbers * step) @ weight.T, numbers @ (weight * step).T
    assert float((one - two).norm() / one.norm()) < 2e-6


def test_with_16_bits_and_whole_weights_outputs_stay():
    inputs, weight = far_out(), normal(32, 64)
    step = steps(inputs.abs().amax(0), 1.0, 16)
    found, exact = rounded(inputs / step, 16) @ (weight * step).T, inputs @ weight.T
    assert float((found - exact).norm() / exact.norm()) < 1e-4


def test_columns_that_are_cut_give_what_the_whole_ones_gave():
    weight, inputs = normal(32, 64), far_out()
    weight[:, [3, 17]] *= 30
    weight[:, 40:60] = 0  # so that what goes is missed by none
    read, share = reconstruction(weight.abs().amax(0), weight.square().sum(0), 2.0)
    assert torch.allclose(inputs[:, read] @ (weight[:, read] * share).T, inputs @ weight.T, rtol=1e-4, atol=1e-3)


def test_columns_far_out_take_the_places_of_the_least_important():
    # Mean 2.5, standard deviation 3.61: with half of it θ = 4.3, so 12 becomes three columns of 4, for the two of least importance.
    sizes = torch.tensor([12.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 2.0])
    read, share = reconstruction(sizes, torch.tensor([0.0, 5.0, 1.0, 6.0, 7.0, 2.0, 8.0, 9.0]), 0.5)
    assert read.tolist() == [0, 0, 0, 1, 3, 4, 6, 7]
    assert share.tolist() == pytest.approx([1 / 3] * 3 + [1.0] * 5)


@pytest.mark.parametrize("deviations", [0.0, 1.0, 3.0])
@pytest.mark.parametrize("sizes", [torch.zeros(8), torch.ones(8), torch.tensor([9.0, 8, 7, 6, 5, 1, 1, 1]), torch.tensor([1e9, 1.0])])
def test_there_are_as_many_columns_as_before_and_all_that_stay_are_read(sizes, deviations):
    read, share = reconstruction(sizes, torch.arange(len(sizes)), deviations)
    assert len(read) == len(share) == len(sizes)
    whole = torch.zeros(len(sizes)).index_add_(0, read, share)
    assert torch.allclose(whole[read.unique()], torch.ones(1))


def test_cutting_columns_helps_where_some_are_far_out():
    # Merged columns far out fill the rows' range, and leave the others few levels.
    inputs, weight = far_out(), normal(48, 64)
    exact = inputs @ weight.T

    def lost(deviations):
        layer, factor = merged(MergeQuant(deviations=deviations), weight, inputs)
        return float((layer(inputs / factor) - exact).norm() / exact.norm()), layer

    (whole, plain), (cut, gathers) = lost(1e9), lost(3.0)
    assert plain.weight_index is None
    assert gathers.weight_index is not None
    assert cut < 0.9 * whole


@pytest.mark.parametrize("is_merged", [True, False])
def test_nothing_is_computed_of_the_inputs(is_merged):
    inputs, weight = far_out(), normal(48, 64)
    if is_merged:
        layer, factor = merged(MergeQuant(), weight, inputs)
        step = factor
    else:
        layer = MergeQuant().layer(weight, gathered(inputs, *MergeQuant.gathers))
        step, factor = layer.input_step, torch.ones(64)
    whole = rounded(inputs / step, 4) * step / factor  # what is rounded away, or clipped, makes no difference
    assert torch.equal(layer(inputs / factor), layer(whole))
    assert torch.equal(layer(inputs / factor)[5:6], layer(inputs[5:6] / factor))
    assert torch.equal(layer(1e6 * whole), layer(1e9 * whole))


def test_a_model_in_8_bits_gives_nearly_what_it_gave_and_its_norms_give_steps():
    model = tiny("llama")
    exact, changed = outputs(model), Model(name="tiny", module=copy.deepcopy(model))
    change(changed, MergeQuant(bits=8, inputs=8), Given(data=batches(model)))
    assert float((outputs(changed.module) - exact).norm() / exact.norm()) < 0.1
    layers = [layer for layer in changed.module.modules() if isinstance(layer, StaticLinear)]
    assert sum(layer.input_step is None for layer in layers) >= 6 * len(changed.module.model.layers)
    seen = []
    block = changed.module.model.layers[0]
    block.input_layernorm.register_forward_hook(lambda _, __, out: seen.append(float(out.abs().max())))
    outputs(changed.module)
    assert 64 < max(seen) < 512


def test_the_sample_has_tokens_at_even_distances():
    inputs = torch.arange(3000.0)[:, None]
    parts = gathered(inputs[:7], "sample")
    assert torch.equal(parts.sample, inputs[:7])
    for start in range(7, 3000, 131):
        parts.add(inputs[start : min(start + 131, 3000)])
    assert SAMPLE < len(parts.sample) <= 2 * SAMPLE
    assert parts.sample.flatten().tolist() == list(range(0, 3000, 4))

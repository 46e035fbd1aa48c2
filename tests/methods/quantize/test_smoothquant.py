import copy

import pytest
import torch
from calibration import batches, normal
from tiny import outputs, tiny

from modelwright.core.given import Given
from modelwright.core.model import Model
from modelwright.core.statistics import Statistics
from modelwright.core.walk import change
from modelwright.methods.quantize.llm_int8 import LlmInt8
from modelwright.methods.quantize.smoothquant import SmoothQuant


def seen(inputs):
    statistics = Statistics(inputs.shape[1], SmoothQuant.gathers)
    statistics.add(inputs)
    return statistics


def factor(migration, inputs, *weights, kind="norm"):
    method = SmoothQuant(migration=migration)
    return method.rescale(kind, [(method, weight) for weight in weights], seen(inputs), lambda _: pytest.fail("it searches nothing"))


def test_a_case_by_hand():
    # Largest inputs 16 and 1; largest weights of the columns over both matrices 4 and 1: s = 16^.5 / 4^.5 = 2 and 1.
    inputs = torch.tensor([[-16.0, 0.5], [3.0, 1.0]])
    first, second = torch.tensor([[4.0, 1.0]]), torch.tensor([[-1.0, 0.25], [2.0, -1.0]])
    assert factor(0.5, inputs, first, second).tolist() == [2.0, 1.0]


def test_the_ends_of_the_migration_even_out_one_side():
    inputs, weight = torch.randn(50, 32) * torch.logspace(-2, 2, 32), normal(8, 32)
    assert torch.allclose((weight * factor(0.0, inputs, weight)).abs().amax(0), torch.ones(32))
    assert torch.allclose((inputs / factor(1.0, inputs, weight)).abs().amax(0), torch.ones(32))


def test_only_norms_take_a_factor_and_inputs_that_stay_zero_keep_theirs():
    inputs = torch.randn(9, 4)
    inputs[:, 2] = 0
    assert factor(0.5, inputs, normal(3, 4), kind="up") is None
    assert factor(0.5, inputs, normal(3, 4))[2] == 1


def test_inputs_far_out_cost_less_after_the_move():
    inputs, weight = torch.randn(256, 64), normal(32, 64)
    inputs[:, [3, 17]] *= 40
    exact = inputs @ weight.T

    def lost(s):
        method = SmoothQuant(bits=4, inputs=4)
        return float((method.packed(weight * s)(inputs / s) - exact).norm() / exact.norm())

    assert lost(factor(0.5, inputs, weight)) < 0.75 * lost(torch.ones(64))


def test_a_model_in_8_bits_gives_nearly_what_it_gave():
    model = tiny("llama")
    data = batches(model)
    exact = outputs(model)
    changed = Model(name="tiny", module=copy.deepcopy(model))
    change(changed, SmoothQuant(), Given(data=data))
    assert float((outputs(changed.module) - exact).norm() / exact.norm()) < 0.05


@pytest.mark.parametrize("bits", [8, 4])
def test_inputs_are_rounded_as_compressed_tensors_does(bits):
    schemes, helpers = (pytest.importorskip(f"compressed_tensors.quantization.{name}") for name in ("quant_args", "utils.helpers"))
    forward = pytest.importorskip("compressed_tensors.quantization.lifecycle.forward")
    layer = LlmInt8(bits=bits, inputs=bits, threshold=0.0).tensor(normal(24, 64))
    inputs = normal(1, 5, 64)
    stated = schemes.QuantizationArgs(**layer.scheme()["input_activations"])
    scale, zero = helpers.compute_dynamic_scales_and_zp(inputs, stated, layer)
    theirs = forward.fake_quantize(inputs, scale, zero, stated)
    assert torch.allclose(layer(inputs), theirs @ layer.dense().T, atol=1e-5)
    assert LlmInt8(threshold=6.0).tensor(normal(24, 64)).scheme() is None  # there some inputs stay as they are, in other steps

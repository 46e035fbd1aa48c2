import pytest
import torch

from modelwright.methods.quantize.llm_int8 import LlmInt8

WEIGHT = torch.randn(48, 96, generator=torch.Generator().manual_seed(6))
INPUTS = torch.randn(20, 96, generator=torch.Generator().manual_seed(7))


def lost(layer, inputs):
    """By rounding the inputs, beside what rounding the weights costs."""
    exact = inputs @ layer.dense().T
    return float((layer(inputs) - exact).norm() / exact.norm())


def test_a_case_by_hand():
    # Weights 127 and 64 are codes 127 and 64 with scale 1. Inputs 2 and 8: 8 reaches the threshold, so its column is multiplied as it
    # is; of the rest the scale is 2/127 and the code 127: 2 * 127 + 8 * 64.
    layer = LlmInt8().tensor(torch.tensor([[127.0, 64.0]]))
    assert layer(torch.tensor([[2.0, 8.0]])).item() == pytest.approx(2 * 127 + 8 * 64)
    assert layer.weight_scale.item() == 1


def test_without_a_threshold_it_is_the_product_of_whole_numbers():
    layer = LlmInt8(threshold=0.0).tensor(WEIGHT)
    scale = INPUTS.abs().amax(1, keepdim=True) / 127.5
    codes = (INPUTS / scale).round().clamp(-128, 127)
    whole = codes.long() @ layer.codes().long().T
    assert torch.allclose(layer(INPUTS), whole * scale * layer.weight_scale.T, rtol=1e-6)


def test_with_a_threshold_that_all_inputs_reach_only_the_weights_are_rounded():
    layer = LlmInt8(threshold=1e-12).tensor(WEIGHT)
    assert torch.allclose(layer(INPUTS), INPUTS @ layer.dense().T, rtol=1e-5, atol=1e-5)


def test_columns_far_out_cost_little():
    inputs = INPUTS.clone()
    inputs[:, [4, 50]] *= 60
    assert lost(LlmInt8().tensor(WEIGHT), inputs) < 0.2 * lost(LlmInt8(threshold=0.0).tensor(WEIGHT), inputs)


def test_weights_come_back_within_half_a_step():
    layer = LlmInt8().tensor(WEIGHT)
    assert ((layer.dense() - WEIGHT).abs() <= WEIGHT.abs().amax(1, keepdim=True) / 254 * 1.001).all()


def test_a_column_that_is_large_in_one_row_is_multiplied_as_it_is_in_all():
    inputs = torch.full((2, 96), 0.5)
    inputs[0, 7] = 50.0
    layer = LlmInt8(inputs=2).tensor(WEIGHT)  # so coarse that a rounded column could not hide
    inputs[1, 7] = 0.2
    found = layer(inputs)[1]
    rest = inputs[1].clone()
    rest[7] = 0
    assert torch.allclose(found, layer.dense() @ rest + 0.2 * layer.dense()[:, 7], atol=1e-4)

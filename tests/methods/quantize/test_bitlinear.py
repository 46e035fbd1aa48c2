import copy

import pytest
import torch
from calibration import SHORT, normal, surprise, taught
from tiny import outputs

from modelwright.blocks.ternary import TernaryLinear
from modelwright.core import plan, walk
from modelwright.core.given import Given
from modelwright.core.model import emptied, stored_bytes
from modelwright.maths import rounding, ternary
from modelwright.methods.distill.recover import Recover
from modelwright.methods.quantize.bitlinear import BitLinear
from modelwright.methods.quantize.pack import Pack
from modelwright.methods.train import Train


def unfused(inputs, gain, weight):
    """The layer as the paper writes it: x + (Q(x) - x).detach(), and the same for the weights."""
    normed = inputs * (inputs.square().mean(-1, keepdim=True) + ternary.EPSILON).rsqrt() * gain
    alpha = 127 / normed.abs().amax(-1, keepdim=True).clamp(min=1e-5)
    rounded = (normed * alpha).round().clamp(-128, 127) / alpha
    beta = 1 / weight.abs().mean().clamp(min=1e-5)
    whole = (weight * beta).round().clamp(-1, 1) / beta
    return (normed + (rounded - normed).detach()) @ (weight + (whole - weight).detach()).T


def test_a_case_by_hand():
    # mean|w| = 1, so the codes are 1, 0, -1 and 0 (halves to even: 0.5 is 0). The root mean square of (3, 4, 0, 0) is 2.5; 1.2 and 1.6 are
    # 95.25 and 127 steps of 1.6 / 127: y = 95 · 1.6 / 127.
    layer = BitLinear().tensor(torch.tensor([[2.0, 0.5, -1.4, 0.1]]))
    codes, scale = layer.codes()
    assert codes.tolist() == [[1, 0, -1, 0]]
    assert scale.tolist() == [1.0]
    assert layer(torch.tensor([[3.0, 4.0, 0.0, 0.0]])).item() == pytest.approx(95 * 1.6 / 127, rel=1e-5)


def test_weights_have_at_most_three_values():
    dense = BitLinear().tensor(normal(48, 96)).dense()
    scale = normal(48, 96).abs().mean()
    assert torch.allclose(dense.unique(), torch.stack([-scale, torch.zeros(()), scale]))


def test_the_gradient_is_that_of_the_unfused_layer():
    tensors = [normal(3, 5, 40, seed=1), 1 + 0.1 * normal(40, seed=2), normal(24, 40, seed=3)]
    found, wanted = ([value.clone().requires_grad_() for value in tensors] for _ in range(2))
    one, two = ternary.trained_product(*found), unfused(*wanted)
    assert torch.allclose(one, two, atol=1e-4)
    push = normal(3, 5, 24, seed=4)
    one.backward(push)
    two.backward(push)
    for own, other in zip(found, wanted, strict=True):
        assert float((own.grad - other.grad).norm() / other.grad.norm()) < 1e-4


def test_the_scale_of_the_inputs_does_not_matter():
    layer, inputs = BitLinear().tensor(normal(24, 40)), normal(6, 40, seed=1)
    assert torch.allclose(layer(inputs), layer(inputs * 8), rtol=1e-4, atol=1e-4)


def test_whole_numbers_give_exactly_what_rounded_floats_give():
    layer, inputs = BitLinear().tensor(normal(24, 40)), normal(6, 40, seed=1)
    codes, scale = layer.codes()
    normed = inputs * (inputs.square().mean(-1, keepdim=True) + ternary.EPSILON).rsqrt()
    numbers, step = rounding.rounded_rows(normed, 8)
    assert torch.equal(layer(inputs), (numbers.long() @ codes.long().T).float() * (step * scale))


@pytest.mark.parametrize("columns", [1, 4, 5, 40, 42])
def test_codes_come_back_from_five_in_a_byte(columns):
    codes = torch.randint(-1, 2, (7, columns), generator=torch.Generator().manual_seed(0), dtype=torch.int8)
    stored = ternary.pack(codes)
    assert stored.shape == (7, -(-columns // 5))
    assert torch.equal(ternary.unpack(stored, columns), codes)


def test_packed_it_computes_the_same_to_the_bit_and_stores_a_fifth_of_a_byte_for_each_weight():
    layer, inputs = BitLinear().tensor(normal(24, 40)), normal(6, 40, seed=1)
    packed = layer.pack()
    assert torch.equal(layer(inputs), packed(inputs))
    assert layer.stored_bytes() == 4 * (24 * 40 + 40)
    assert packed.stored_bytes() == 24 * 40 // 5 + 4 + 4 * 40
    assert packed.to(torch.bfloat16).weight_scale.dtype == torch.float32


@pytest.mark.parametrize("method", [Train, Recover])
def test_a_short_training_makes_up_for_much_of_it_and_packing_keeps_that(method, tmp_path):
    model, given = taught()
    start, given.teacher = surprise(model), copy.deepcopy(model)
    broken = surprise(walk.change(model, BitLinear(), Given()))
    assert broken > start + 0.3
    walk.change(model, method(**SHORT | dict(tokens=12288)), given)
    assert surprise(model) < broken - 0.5 * (broken - start)
    before, held, empty = outputs(model.module), stored_bytes(model.module), emptied(model.module)
    walk.change(model, Pack(), Given())
    assert torch.equal(outputs(model.module), before)
    assert stored_bytes(model.module) < 0.6 * held
    assert stored_bytes(model.module) == stored_bytes(plan.predict(empty, Pack(), Given())[0])
    assert model.marks == {"packed"}
    model.save(tmp_path / "out")
    assert torch.equal(outputs(walk.open(tmp_path / "out").module), before)


def test_one_step_of_training_changes_weights_and_gains():
    model, given = taught()
    walk.change(model, BitLinear(), Given())
    layer = next(layer for layer in model.module.modules() if isinstance(layer, TernaryLinear))
    weight, gain = layer.weight_master.detach().clone(), layer.norm.detach().clone()
    walk.change(model, Train(**SHORT | dict(tokens=256)), given)
    assert not torch.equal(layer.weight_master, weight)
    assert not torch.equal(layer.norm, gain)

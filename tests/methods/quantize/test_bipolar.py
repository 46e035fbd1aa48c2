import pytest
import torch

from modelwright.maths import bit_planes
from modelwright.methods.quantize.bipolar import Bipolar
from modelwright.methods.quantize.rtn import Rtn


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def drawn(bits, rows, columns, seed=0):
    return torch.randint(2**bits, (rows, columns), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)


def test_a_case_by_hand():
    # 2 bits: -3, -1, 1, 3 times 6 / 3 = 2, that is -6, -2, 2, 6; codes 3, 0, 2, 1; high bits 1010, low bits 1001, the first lowest
    layer = Bipolar(bits=2, group=0).tensor(torch.tensor([[6.0, -4.5, 0.5, -3.9]]))
    assert layer.dense().tolist() == [[6.0, -6.0, 2.0, -2.0]]
    assert layer.weight_planes.tolist() == [[[0b0101]], [[0b1001]]]
    # without the low plane: signs, times 2 · 2
    assert layer.first(1).dense().tolist() == [[4.0, -4.0, 4.0, -4.0]]


@pytest.mark.parametrize("columns", [16, 13])
@pytest.mark.parametrize(("n", "m"), [(1, 1), (3, 2), (4, 8), (8, 8)])
def test_the_sum_over_planes_is_the_product_of_the_whole_numbers(n, m, columns):
    left, right = drawn(n, 5, columns), drawn(m, 7, columns, seed=1)
    v, w = 2 * left.long() - (2**n - 1), 2 * right.long() - (2**m - 1)
    found = bit_planes.product(bit_planes.planes(left, n), bit_planes.planes(right, m), columns)
    assert found.dtype == torch.int64
    assert torch.equal(found, v @ w.T)


def test_planes_hold_the_codes_and_the_numbers_are_odd():
    codes = drawn(5, 6, 21)
    stored = bit_planes.planes(codes, 5)
    assert stored.shape == (5, 6, 3)
    assert torch.equal(bit_planes.codes(stored, 21), codes)
    assert (bit_planes.numbers(stored, 21).abs() % 2 == 1).all()
    assert bit_planes.numbers(stored, 21).abs().max() <= 31


def test_signed_whole_numbers_need_one_sum_of_a_row_to_be_corrected():
    q, x = drawn(4, 5, 24).long() - 8, drawn(3, 6, 24, seed=1)
    flipped = (q & 15) ^ 8  # the top bit of two's complement
    v = bit_planes.numbers(bit_planes.planes(flipped.to(torch.uint8), 4), 24)
    assert torch.equal(v.long(), 2 * q + 1)
    odd = 2 * x.long() - 7
    whole = bit_planes.product(bit_planes.planes(flipped.to(torch.uint8), 4), bit_planes.planes(x, 3), 24)
    assert torch.equal(2 * (q @ odd.T), whole - odd.sum(1))


def test_one_bit_is_the_sign_times_the_mean_size():
    weight = normal(12, 64)
    expected = weight.sign() * weight.abs().mean(1, keepdim=True)
    assert torch.allclose(Bipolar(bits=1, group=0).tensor(weight).dense(), expected)
    error = (expected - weight).square().mean() / weight.square().mean()
    assert error == pytest.approx(0.3615, rel=0.15)


@pytest.mark.parametrize("bits", range(2, 9))
def test_it_is_a_uniform_quantiser_without_a_zero(bits):
    weight = normal(16, 96)
    layer = Bipolar(bits=bits, group=32).tensor(weight)
    step = 2 * weight.view(16, 3, 32).abs().amax(-1, keepdim=True) / (2**bits - 1)
    expected = ((weight.view(16, 3, 32) / step).floor().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) + 0.5) * step
    assert torch.allclose(layer.dense(), expected.view(16, 96), atol=1e-5)
    assert (layer.dense() - weight).abs().max() <= step.max() / 2 + 1e-5
    assert torch.equal(layer.dense(), Rtn(grid="odd", bits=bits, group=32).tensor(weight).dense())


def test_zeros_do_not_stay():
    weight = normal(8, 64)
    weight[:, ::3] = 0
    assert (Bipolar().tensor(weight).dense() != 0).all()


@pytest.mark.parametrize("kept", [1, 2, 5])
def test_the_first_planes_are_the_weights_in_fewer_bits(kept):
    weight = normal(16, 96).bfloat16()
    whole = Bipolar(bits=6, group=32).tensor(weight)
    fewer = whole.first(kept)
    assert torch.equal(fewer.weight_planes, whole.weight_planes[:kept])  # a prefix of what is stored
    assert torch.equal(bit_planes.codes(fewer.weight_planes, 96), bit_planes.codes(whole.weight_planes, 96) >> (6 - kept))
    step = (2 ** (6 - kept) * whole.weight_scale).float().repeat_interleave(32, 1)
    assert ((fewer.dense().float() - weight.float()).abs() <= 1.05 * step).all()
    assert torch.equal(whole.first(6).dense(), whole.dense())


def test_bytes_are_those_of_the_bits():
    layer = Bipolar(bits=3, group=32).tensor(normal(16, 96).bfloat16())
    assert layer.stored_bytes() == 16 * 96 * 3 // 8 + 16 * 3 * 2

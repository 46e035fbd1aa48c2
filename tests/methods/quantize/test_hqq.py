import pytest
import torch

from modelwright.blocks import build
from modelwright.maths import grids, rounding
from modelwright.methods.quantize.hqq import Hqq

WEIGHT = torch.randn(32, 256, generator=torch.Generator().manual_seed(8)) * torch.logspace(-2, 0, 32)[:, None]


def heavy():
    weight = WEIGHT.clone()
    weight[:, ::50] *= 6
    return weight


def error(layer, weight):
    return (layer.dense().float() - weight.float()).abs().view(32, -1, 64).mean(-1)


def test_one_step_by_hand():
    # Weights 0, 0.9, 2.1, 2, 3.9 in 2 bits: step 1.3, z = 0 for codes 0 to 3 (-2 for signed ones). Codes 0, 1, 2, 2, 3 stand for
    # 0, 1.3, 2.6, 2.6, 3.9; errors 0, -0.4, -0.5, -0.6, 0. With p = 1 shrinking takes 1/strength = 0.1 from the sizes of three, so that
    # z moves by 3 · 0.1/1.3 over 5. All errors then rise by 0.06, and the mean size falls from 0.3 to 0.288.
    weight = torch.tensor([[0.0, 0.9, 2.1, 2.0, 3.9]])
    scale, zero = rounding.half_quadratic(weight, 2, power=1.0, strength=10.0, iterations=1)
    assert scale.item() == pytest.approx(1.3)
    assert zero.item() == pytest.approx(-2 + 3 * 0.1 / 1.3 / 5, abs=1e-5)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_group_loses_more_than_by_rounding_with_its_range(bits, dtype):
    weight = heavy().to(dtype)
    ours = Hqq(bits=bits).tensor(weight)
    scale, _ = rounding.half_quadratic(weight, bits, 64, iterations=1)
    first = (-weight.float().view(32, -1, 64).amin(-1) / scale.float() - 2 ** (bits - 1)).to(dtype)
    first = first.round() if bits == 4 else first
    plain = grids.Affine(scale, first, bits)
    lost = (grids.nearest(weight, plain).float() - weight.float()).abs().view(32, -1, 64).mean(-1)
    slack = 1.0001 if dtype == torch.float32 else 1.05  # weights themselves are rounded to 16 bits, by as much as a step of 8 bits
    assert (error(ours, weight) <= lost * slack + weight.abs().amax() * (0 if dtype == torch.float32 else 2**-12)).all()
    assert torch.equal(ours.weight_scale, scale)  # only zero points move
    if bits < 8:
        assert error(ours, weight).mean() < 0.99 * lost.mean()


def test_of_groups_with_values_far_out_the_mean_error_is_below_that_of_rounding():
    weight = heavy()
    rounded = grids.nearest(weight, grids.affine(weight, 3, 64, symmetric=False))
    assert error(Hqq(bits=3).tensor(weight), weight).mean() < 0.95 * (rounded - weight).abs().mean()


def test_groups_of_one_value_are_finite_and_close():
    weight = torch.full((32, 64), 0.37)
    assert torch.allclose(Hqq().tensor(weight).dense(), weight, atol=1e-3)
    assert (Hqq().tensor(torch.zeros(32, 64)).dense() == 0).all()


def test_a_layer_with_float_zero_points_is_described_and_built():
    layer = Hqq().tensor(WEIGHT)
    other = build(layer.describe(), dtype=torch.float32)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other.dense(), layer.dense())
    assert layer.weight_zero_point.dtype == torch.float32
    assert layer.scheme() is None


@pytest.mark.parametrize(("dtype", "size", "bits"), [(torch.bfloat16, 1e-4, 4), (torch.bfloat16, 1e-3, 8), (torch.float32, 1e-6, 4)])
def test_small_weights_lose_no_more_than_by_rounding(dtype, size, bits):
    weight = (torch.randn(32, 256, generator=torch.Generator().manual_seed(9)) * size).to(dtype)
    rounded = grids.nearest(weight, grids.affine(weight, bits, 64, symmetric=False)).float()
    lost = float((rounded - weight.float()).square().mean())
    assert float((Hqq(bits=bits).tensor(weight).dense().float() - weight.float()).square().mean()) < 1.1 * lost


def test_large_groups_of_one_value_are_finite_in_float16():
    layer = Hqq().tensor(torch.full((2, 64), 4.0, dtype=torch.float16))
    assert torch.allclose(layer.dense(), torch.full((2, 64), 4.0, dtype=torch.float16), rtol=0.01)


def test_rows_do_not_depend_on_those_far_from_them():
    weight = torch.randn(2 * rounding.ROWS + 5, 64, generator=torch.Generator().manual_seed(10))
    part = slice(rounding.ROWS, 2 * rounding.ROWS)
    assert torch.equal(Hqq(bits=3).tensor(weight).dense()[part], Hqq(bits=3).tensor(weight[part]).dense())

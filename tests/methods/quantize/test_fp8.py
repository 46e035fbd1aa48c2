import pytest
import torch
from tiny import tiny

import modelwright as mw
from modelwright.core.errors import SiteError
from modelwright.methods.quantize.fp8 import Fp8

WEIGHT = torch.randn(300, 256, generator=torch.Generator().manual_seed(4))


def test_a_case_by_hand():
    # Rows with the largest sizes 448 and 4.48: scales 1 and 0.01. 17 lies between 16 and 18, a tie that goes to the even mantissa 16.
    weight = torch.tensor([[448.0, 17.0, 0.0], [-4.48, 0.17, 0.0]])
    assert torch.allclose(Fp8().tensor(weight).dense(), torch.tensor([[448.0, 16.0, 0.0], [-4.48, 0.16, 0.0]]), rtol=1e-6)


@pytest.mark.parametrize("scope", ["row", "tensor", "tile"])
def test_each_error_is_at_most_a_sixteenth_of_the_weight(scope):
    found = Fp8(scope=scope).tensor(WEIGHT).dense()
    normal = WEIGHT.abs() > WEIGHT.abs().max() / 448 * 2**-6
    assert ((found - WEIGHT).abs() <= WEIGHT.abs() / 16 * 1.0001)[normal].all()
    assert found.abs().max() == pytest.approx(WEIGHT.abs().max().item())


def test_the_error_on_rows_of_normal_weights_is_the_one_that_is_known():
    found = Fp8().tensor(WEIGHT).dense()
    assert float((found - WEIGHT).square().mean() / WEIGHT.square().mean()) == pytest.approx(6.9e-4, rel=0.03)


def test_tiles_have_scales_of_their_own():
    weight = WEIGHT.clone()
    weight[:128, :128] *= 1000
    layer = Fp8(scope="tile").tensor(weight)
    assert layer.weight_scale.shape == (3, 2)
    assert torch.allclose(layer.weight_scale[2, 1], weight[256:, 128:].abs().max() / 448)
    assert torch.equal(layer.dense()[128:], Fp8(scope="tile").tensor(weight[128:]).dense())


def test_rows_that_no_tile_fits_are_left_out_by_name():
    with pytest.raises(SiteError, match=r"no multiple of 128"):
        mw.apply(tiny("llama"), Fp8(scope="tile"))

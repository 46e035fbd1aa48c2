"""Whole numbers between the least and the greatest value of each group."""

import pytest
import torch

from modelwright.maths.ranges import cut, filled


def test_by_hand():
    # 2 bits: from 1 to 7 in three steps of 2, so that 2.9 lies nearest to 3; the second group is one value throughout
    values = torch.tensor([[1.0, 2.9, 5.0, 7.0, -4.0, -4.0, -4.0, -4.0]])
    codes, scale, low = cut(values, 2, 4)
    assert codes.tolist() == [[0b11_10_01_00, 0]]
    assert (scale.tolist(), low.tolist()) == ([[2.0, 0.0]], [[1.0, -4.0]])
    assert filled(codes, scale, low, 2).tolist() == [[1.0, 3.0, 5.0, 7.0, -4.0, -4.0, -4.0, -4.0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", range(1, 9))
def test_no_value_is_off_by_more_than_half_a_step(bits, dtype):
    values = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    codes, scale, low = cut(values, bits, 16)
    assert codes.shape == (2, 3, 8 * bits)
    assert scale.shape == low.shape == (2, 3, 4)
    assert scale.dtype == dtype
    error = (filled(codes, scale, low, bits).float() - values.float()).abs().unflatten(-1, (4, 16)).amax(-1)
    # the stored scale is off by its last bit, as often as there are steps, and so is the result
    slack = (2**bits * scale.float() + values.abs().max().float()) * torch.finfo(dtype).eps
    assert (error <= scale.float() / 2 + slack).all()


def test_values_that_are_codes_come_back_exactly():
    values = torch.arange(16.0).repeat(3, 1) * torch.tensor([[1.0], [0.25], [8.0]]) - 3
    assert torch.equal(filled(*cut(values, 4, 16), 4), values)

import pytest
import torch

from modelwright.maths.bits import packed, unpacked


def test_the_first_entry_is_the_lowest_bit():
    mask = torch.tensor([[True, False, False, True, False, False, False, False, True], [False] * 8 + [True]])
    assert packed(mask).tolist() == [[9, 1], [0, 1]]
    assert torch.equal(unpacked(packed(mask), 9), mask)


def test_in_the_other_order_the_first_entry_is_the_highest_bit():
    mask = torch.tensor([True, False, False, True, False, False, False, False, True])
    assert packed(mask, order="big").tolist() == [0b1001_0000, 0b1000_0000]
    assert torch.equal(unpacked(packed(mask, order="big"), 9, order="big"), mask)


@pytest.mark.parametrize("shape", [(0,), (1,), (8,), (3, 7), (2, 3, 17)])
def test_bits_come_back(shape):
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(0)) < 0.5
    assert packed(mask).shape == (*shape[:-1], -(-shape[-1] // 8))
    assert torch.equal(unpacked(packed(mask), shape[-1]), mask)

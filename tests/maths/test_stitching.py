import pytest
import torch

from modelwright.maths.slices import flat
from modelwright.maths.stitching import reaching, stitched


def stitch(base, donors, masks, weights, scale=1.0):
    return stitched(base, donors, [flat(mask) for mask in masks], weights, scale).whole()


def test_changes_of_just_that_size_reach_it_and_what_did_not_change_never_does():
    change = torch.tensor([0.5, -0.5, 0.49, 0.0])
    assert reaching(lambda at: change[at].clone(), 0.5)(slice(0, 4)).tolist() == [True, True, False, False]
    assert reaching(lambda at: change[at].clone(), 0.0)(slice(0, 4)).tolist() == [True, True, True, False]


def test_overlaps_by_hand():
    # Entry 0: both, (3 · 2 + 1 · 6)/4 = 3; entry 1: the second's 8; entry 2: none, the base's 10. Half way: 6.5, 9, 10.
    base, donors = torch.full((3,), 10.0), [torch.tensor([2.0, 5.0, 5.0]), torch.tensor([6.0, 8.0, 5.0])]
    masks = [torch.tensor([True, False, False]), torch.tensor([True, True, False])]
    assert stitch(base, donors, masks, [3.0, 1.0]).tolist() == [3.0, 8.0, 10.0]
    assert stitch(base, donors, masks, [3.0, 1.0], 0.5).tolist() == [6.5, 9.0, 10.0]


def test_what_one_mask_alone_covers_is_the_donors_bit_for_bit():
    # Far from the base, base + (donor - base) would round: 1e-9 - 1e9 loses the donor.
    base, donor = torch.tensor([1e9, -1e-30, 3.0]), torch.tensor([1e-9, 7e20, 0.1])
    for weight in (1.0, 0.3, 1e-3):
        assert torch.equal(stitch(base, [donor], [torch.ones(3, dtype=torch.bool)], [weight]), donor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_result_has_the_bases_dtype(dtype):
    donor = torch.ones(3, dtype=torch.float16)
    assert stitch(torch.zeros(3, dtype=dtype), [donor], [torch.ones(3, dtype=torch.bool)], [1.0]).dtype == dtype

import pytest
import torch
from calibration import normal
from merging import merged
from tiny import tiny

import modelwright as mw
from modelwright.core.errors import NeedError, SettingError
from modelwright.maths import slices
from modelwright.methods.merge.nearswap import Nearswap

BASE = normal(30, 50)
DONOR = BASE + 0.1 * normal(30, 50, seed=1)


@pytest.fixture(autouse=True)
def small_slices(monkeypatch):
    monkeypatch.setattr(slices, "SLICE", 400)


def test_a_case_by_hand():
    # Differences .5, 2 and -4 with t = 1: weights 1, ½ and ¼ of the donor.
    base = torch.tensor([1.0, 1.0, 1.0])
    assert merged(Nearswap(t=1.0), base, [torch.tensor([1.5, 3.0, -3.0])]).tolist() == [1.5, 2.0, 0.0]


def test_it_is_the_published_weight():
    share = (0.05 / (DONOR - BASE).abs()).clamp(max=1)
    assert torch.allclose(merged(Nearswap(t=0.05), BASE, [DONOR]), (1 - share) * BASE + share * DONOR, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_step_is_the_model_and_a_large_one_the_donor_bit_for_bit(dtype):
    base, donor = BASE.to(dtype), DONOR.to(dtype)
    assert torch.equal(merged(Nearswap(t=0.0), base, [donor]), base)
    assert torch.equal(merged(Nearswap(t=10.0), base, [donor]), donor)


def test_equal_entries_stay_and_nothing_is_divided_by_zero():
    assert torch.equal(merged(Nearswap(t=0.0), BASE, [BASE]), BASE)
    assert torch.equal(merged(Nearswap(), BASE, [BASE]), BASE)


def test_two_donors_and_a_negative_step_are_refused():
    with pytest.raises(NeedError, match=r"merge\.nearswap takes 1 donor; the step gives 2"):
        mw.apply(tiny(), Nearswap(), donors=[tiny(), tiny()])
    with pytest.raises(SettingError, match="t must be a number of at least 0; got -1"):
        Nearswap(t=-1)


def test_a_difference_of_the_whole_step_is_adopted_bit_for_bit():
    # 1e-9 - 1 rounds to -1 = -t: the donor's 1e-9 is taken, and not 1 - 1.
    assert merged(Nearswap(t=1.0), torch.ones(1), [torch.tensor([1e-9])]).tolist() == torch.tensor([1e-9]).tolist()

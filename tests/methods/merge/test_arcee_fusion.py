import math

import pytest
import torch
from calibration import normal
from merging import merged
from tiny import tiny

import modelwright as mw
from modelwright.core.errors import NeedError
from modelwright.maths import slices
from modelwright.methods.merge.arcee_fusion import ArceeFusion, divergence

BASE = normal(30, 50)
DONOR = BASE + 0.1 * normal(30, 50, seed=1)


@pytest.fixture(autouse=True)
def small_slices(monkeypatch):
    monkeypatch.setattr(slices, "SLICE", 400)


def test_a_divergence_by_hand():
    # Rows (0, 0) and (0, ln 3): softmax (½, ½) and (¼, ¾). KL(new ‖ old) = ¼ ln ½ + ¾ ln 3/2.
    found = divergence(torch.zeros(1, 2), torch.tensor([[0.0, math.log(3)]]))
    assert found.tolist() == pytest.approx([0.25 * math.log(0.5) + 0.75 * math.log(1.5)])


def test_a_case_by_hand():
    # In one row scores go with |Δ|: quartiles .125, .25, .375, so that what reaches .25 + 1.5·.25 = .625 stands out.
    base = torch.zeros(1, 6)
    donor = torch.tensor([[3.0, 0.1, -0.2, 0.3, -0.4, 0.0]])
    assert merged(ArceeFusion(), base, [donor]).tolist() == [[3.0, 0.0, 0.0, 0.0, 0.0, 0.0]]


def test_it_is_the_published_threshold():
    before, after = BASE.softmax(-1), DONOR.softmax(-1)
    score = (DONOR - BASE).abs() * (after * (after / before).log()).sum(-1, keepdim=True)
    low, middle, high = (score.quantile(share) for share in (0.25, 0.5, 0.75))
    expected = torch.where(score >= middle + 1.5 * (high - low), DONOR, BASE)
    found = merged(ArceeFusion(), BASE, [DONOR])
    assert torch.equal(found, expected)
    assert 0 < (found != BASE).float().mean() < 0.3


def test_a_donor_that_is_the_model_changes_nothing():
    assert torch.equal(merged(ArceeFusion(), BASE, [BASE]), BASE)


def test_odd_shapes_are_merged():
    assert merged(ArceeFusion(), torch.tensor(1.0), [torch.tensor(2.0)]).shape == ()
    assert merged(ArceeFusion(), normal(2, 3, 5), [normal(2, 3, 5, seed=1)]).shape == (2, 3, 5)


def test_two_donors_are_refused():
    with pytest.raises(NeedError, match=r"merge\.arcee_fusion takes 1 donor; the step gives 2"):
        mw.apply(tiny(), ArceeFusion(), donors=[tiny(), tiny()])


def test_an_empty_tensor_stays_empty():
    assert merged(ArceeFusion(), torch.zeros(0, 4), [torch.zeros(0, 4)]).shape == (0, 4)


def test_what_just_reaches_the_threshold_is_taken():
    # All scores are alike, so that median and quartiles are too: every entry reaches the threshold.
    donor = torch.tensor([[1.0, -1.0, 1.0, -1.0]])
    assert torch.equal(merged(ArceeFusion(), torch.zeros(1, 4), [donor]), donor)


def test_divergences_of_nearby_rows_are_more_than_their_rounding():
    # To second order it is half of the variance of Δ under softmax, here about 5e-9; float32 rounds sums of 1 at 1e-7.
    before = normal(8, 1000)
    after = before + 1e-4 * normal(8, 1000, seed=1)
    share, change = before.double().softmax(-1), after.double() - before.double()
    variance = (share * change.square()).sum(-1) - (share * change).sum(-1).square()
    assert torch.allclose(divergence(before, after).double(), variance / 2, rtol=1e-2)


@pytest.mark.parametrize("size", [1e-3, 0.1, 1.0, 10.0])
def test_divergences_from_changes_are_those_of_the_formula(size):
    before = normal(8, 1000)
    after = before + size * normal(8, 1000, seed=1)
    old, new = before.double().log_softmax(-1), after.double().log_softmax(-1)
    assert torch.allclose(divergence(before, after).double(), (new.exp() * (new - old)).sum(-1), rtol=2e-4)
    assert torch.allclose(divergence(before.double(), after.double()), (new.exp() * (new - old)).sum(-1), rtol=1e-6)

import pytest
import torch
from calibration import normal
from merging import merged
from tiny import tiny

import modelwright as mw
from modelwright.core.errors import NeedError
from modelwright.maths import slices
from modelwright.methods.merge.linear import Linear
from modelwright.methods.merge.model_stock import ModelStock

BASE = normal(30, 50)
COMMON = normal(30, 50, seed=9)
DONORS = [BASE + 0.1 * (COMMON + normal(30, 50, seed=seed)) for seed in (1, 2, 3)]


@pytest.fixture(autouse=True)
def small_slices(monkeypatch):
    monkeypatch.setattr(slices, "SLICE", 400)


def test_a_case_by_hand():
    # Changes (1, 0) and (1, √3): cos 60° = ½, t = 2·½/(1 + ½) = 2/3, times the mean change (1, √3/2).
    base = torch.tensor([5.0, 5.0])
    donors = [base + torch.tensor([1.0, 0.0]), base + torch.tensor([1.0, 3**0.5])]
    assert merged(ModelStock(), base, donors).tolist() == pytest.approx([5 + 2 / 3, 5 + 3**0.5 / 3])


def test_changes_at_right_angles_leave_the_model():
    base = normal(3, 4)
    donors = [base.clone(), base.clone()]
    donors[0][0] += 1
    donors[1][1] += 2
    assert torch.equal(merged(ModelStock(), base, donors), base)


def test_identical_donors_are_returned():
    assert torch.allclose(merged(ModelStock(), BASE, DONORS[:1] * 3), DONORS[0], atol=1e-6)


@pytest.mark.parametrize("count", [2, 3])
def test_it_is_the_published_ratio(count):
    changes = torch.stack([(donor - BASE).flatten().double() for donor in DONORS[:count]])
    units = changes / changes.norm(dim=1, keepdim=True)
    cosine = ((units @ units.T).sum() - count) / (count * (count - 1))
    t = count * cosine / (1 + (count - 1) * cosine)
    mean = merged(Linear(), BASE, DONORS[:count])
    assert torch.allclose(merged(ModelStock(), BASE, DONORS[:count]), (t * mean + (1 - t) * BASE).float(), atol=1e-6)


def test_each_row_may_have_a_share_of_its_own():
    found = merged(ModelStock(by_row=True), BASE, DONORS)
    for row in range(30):
        assert torch.allclose(found[row], merged(ModelStock(), BASE[row], [donor[row] for donor in DONORS]), atol=1e-6)


def test_changes_that_point_apart_leave_the_model_and_never_explode():
    # Three changes at 120° to each other: cos θ = -½ = -1/(N-1), where the formula divides by zero.
    changes = torch.tensor([[1.0, 0.0], [-0.5, 0.75**0.5], [-0.5, -(0.75**0.5)]])
    assert torch.equal(merged(ModelStock(), torch.ones(2), list(1 + changes)), torch.ones(2))
    assert torch.equal(merged(ModelStock(by_row=True), BASE, [BASE, BASE]), BASE)


def test_one_donor_is_refused():
    with pytest.raises(NeedError, match=r"merge\.model_stock takes 2 or more donors; the step gives 1"):
        mw.apply(tiny(), ModelStock(), donors=[tiny()])

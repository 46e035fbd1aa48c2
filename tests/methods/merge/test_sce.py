import pytest
import torch
from calibration import normal
from merging import merged

from modelwright.core.errors import SettingError
from modelwright.maths import slices
from modelwright.methods.merge.sce import Sce

BASE = normal(30, 50)
DONORS = [BASE + scale * normal(30, 50, seed=seed) for seed, scale in ((1, 0.1), (2, 0.2), (3, 0.3))]


@pytest.fixture(autouse=True)
def small_slices(monkeypatch):
    monkeypatch.setattr(slices, "SLICE", 400)


def test_a_case_by_hand():
    # Changes (3, 1, 0) and (1, -3, 0): squares sum to 10 each, so both count ½. Sums 4, -2, 0: entry 0 is
    # (½·3 + ½·1)/1 = 2, entry 1 is -3 of the second alone, entry 2 stays.
    base = torch.full((3,), 10.0)
    donors = [base + torch.tensor([3.0, 1.0, 0.0]), base + torch.tensor([1.0, -3.0, 0.0])]
    assert merged(Sce(), base, donors).tolist() == [12.0, 7.0, 10.0]
    # Variances 1, 4, 0: of the two that are not 0 half is one, entry 1. Squares 1 and 9; the sign is minus.
    assert merged(Sce(keep=0.5), base, donors).tolist() == [10.0, 7.0, 10.0]


@pytest.mark.parametrize("keep", [0.1, 0.55, 1.0])
def test_it_is_the_published_select_calculate_erase(keep):
    changes = torch.stack([(donor - BASE).flatten() for donor in DONORS])
    if keep < 1:
        chosen = changes.var(0).topk(int(keep * changes.shape[1])).indices
        mask = torch.zeros(changes.shape[1]).index_fill_(0, chosen, 1)
        changes = changes * mask
    shares = changes.square().mean(1)
    shares = shares / shares.sum()
    agree = changes.sign() == torch.where(changes.sum(0) >= 0, 1.0, -1.0)
    weight = shares[:, None] * agree
    expected = BASE + ((weight * changes).sum(0) / weight.sum(0).clamp(min=1e-6)).view_as(BASE)
    assert torch.allclose(merged(Sce(keep=keep), BASE, DONORS), expected, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_keeping_nothing_gives_the_model_bit_for_bit(dtype):
    base = BASE.to(dtype)
    assert torch.equal(merged(Sce(keep=0.0), base, [donor.to(dtype) for donor in DONORS]), base)


def test_what_all_donors_changed_alike_counts_only_without_selection():
    donors = [BASE + 1] * 3
    assert torch.allclose(merged(Sce(), BASE, donors), BASE + 1)
    assert torch.equal(merged(Sce(keep=0.9), BASE, donors), BASE)  # no variance anywhere


def test_the_order_of_the_donors_does_not_matter():
    assert torch.allclose(merged(Sce(keep=0.3), BASE, DONORS), merged(Sce(keep=0.3), BASE, DONORS[::-1]), atol=1e-6)


def test_one_donor_is_returned_and_donors_that_are_the_model_leave_it():
    assert torch.allclose(merged(Sce(), BASE, DONORS[:1]), DONORS[0], atol=1e-6)
    assert torch.equal(merged(Sce(), BASE, [BASE] * 2), BASE)


def test_a_share_beyond_the_whole_is_refused():
    with pytest.raises(SettingError, match="keep must be a number from 0 to 1; got 2"):
        Sce(keep=2)

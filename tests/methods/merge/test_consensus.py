import pytest
import torch
from calibration import normal
from merging import merged

from modelwright.core.errors import SettingError
from modelwright.maths import slices
from modelwright.methods.merge.consensus import Consensus
from modelwright.methods.merge.task_arithmetic import TaskArithmetic
from modelwright.methods.merge.ties import Ties

BASE = normal(30, 50)
DONORS = [BASE + 0.1 * normal(30, 50, seed=seed) for seed in (1, 2, 3)]


@pytest.fixture(autouse=True)
def small_slices(monkeypatch):
    monkeypatch.setattr(slices, "SLICE", 400)


def test_a_case_by_hand():
    # Changes (4, 1, 3) and (4, 4, -3), λ = ½. Entry 0: 4 > ½·4 for both. Entry 1: 1 > ½·4 for none but the second.
    # Entry 2: each against the other: 3 > ½·3 for both, though they cancel.
    base = torch.full((3,), 10.0)
    donors = [base + torch.tensor([4.0, 1.0, 3.0]), base + torch.tensor([4.0, 4.0, -3.0])]
    assert merged(Consensus(least=0.5), base, donors).tolist() == [18.0, 10.0, 10.0]
    assert merged(Consensus(least=0.5, agree=1), base, donors).tolist() == [18.0, 15.0, 10.0]
    assert merged(Consensus(least_each=[0.2, 0.5], scale=0.5), base, donors).tolist() == [14.0, 12.5, 10.0]


@pytest.mark.parametrize("agree", [1, 2, 3])
@pytest.mark.parametrize("least", [0.2, 0.6])
def test_it_is_the_published_mask(agree, least):
    changes = torch.stack([donor - BASE for donor in DONORS])
    total = changes.sum(0)
    mask = (changes.abs() > least * (total - changes).abs()).sum(0) >= agree
    found = merged(Consensus(agree=agree, least=least, scale=0.3), BASE, DONORS)
    assert torch.allclose(found, BASE + 0.3 * total * mask, atol=1e-6)
    share = mask.float().mean()
    assert share > 0
    assert (share == 1) == (agree == 1 and least == 0.2)  # the largest of three is more than a fifth of the other two


def test_no_needed_agreement_is_task_arithmetic():
    weights = [0.4, -0.2, 0.7]
    ours = merged(Consensus(agree=0, weights=weights, scale=1.5), BASE, DONORS)
    arithmetic = merged(TaskArithmetic(weights=weights, scale=1.5), BASE, DONORS)  # which multiplies weights and scale first
    assert torch.allclose(ours, arithmetic, rtol=1e-6, atol=1e-6)


def test_the_merged_change_may_be_that_of_ties():
    settings = dict(keep=0.3, consensus=True, normalize=True)
    ties = merged(Ties(keep=0.3), BASE, DONORS)
    assert torch.equal(merged(Consensus(agree=0, **settings), BASE, DONORS), ties)
    masked = merged(Consensus(agree=2, **settings), BASE, DONORS)
    kept = masked != BASE
    assert torch.equal(masked[kept], ties[kept])
    assert kept.sum() < (ties != BASE).sum()


def test_more_agreement_adds_less():
    moved = [(merged(Consensus(agree=agree), BASE, DONORS) != BASE).sum().item() for agree in range(4)]
    assert moved == sorted(moved, reverse=True)
    assert moved[3] < moved[2]


def test_scale_zero_gives_the_model_bit_for_bit():
    assert torch.equal(merged(Consensus(scale=0.0), BASE, DONORS), BASE)


def test_more_agreement_than_donors_is_refused():
    with pytest.raises(SettingError, match=r"merge\.consensus: agree=2 of 1 donors is never reached"):
        merged(Consensus(), BASE, DONORS[:1])
    with pytest.raises(SettingError, match="2 least_each for 3 donors"):
        merged(Consensus(least_each=[0.2, 0.4]), BASE, DONORS)


def test_a_change_as_large_as_the_bound_is_not_needed_and_weights_count():
    # Changes 2 and 4, λ = ½: 2 > ½ · 4 is not true, and 4 > ½ · 2 is, so one donor needs the entry.
    base, donors = torch.zeros(1), [torch.tensor([2.0]), torch.tensor([4.0])]
    assert merged(Consensus(least=0.5), base, donors).item() == 0
    assert merged(Consensus(least=0.5, agree=1), base, donors).item() == 6
    # With the weights 2 and 1 both changes are 4, and both are needed; with 1 and ¼ they are 2 and 1, with 1 and 9 2 and 36.
    assert merged(Consensus(least=0.5, weights=[2, 1]), base, donors).item() == 8
    assert merged(Consensus(least=0.4, weights=[1, 0.25]), base, donors).item() == 3
    assert merged(Consensus(least=0.5, weights=[1, 9]), base, donors).item() == 0


def test_one_that_must_agree_removes_what_nobody_needs_and_two_what_one_alone_needs():
    changes = torch.stack([donor - BASE for donor in DONORS])
    total = changes.sum(0)
    needed = (changes.abs() > 0.4 * (total - changes).abs()).sum(0)
    for agree in (1, 2):
        moved = merged(Consensus(agree=agree), BASE, DONORS) != BASE
        assert torch.equal(moved, (needed >= agree) & (total != 0))

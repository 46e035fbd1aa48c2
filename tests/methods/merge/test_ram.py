import pytest
import torch
from calibration import normal
from merging import merged
from tiny import tiny

import modelwright as mw
from modelwright.core.errors import SettingError
from modelwright.maths import slices
from modelwright.methods.merge.linear import Linear
from modelwright.methods.merge.ram import Ram
from modelwright.methods.merge.task_arithmetic import TaskArithmetic

BASE = normal(30, 50)
SPARSE = [(0.1 * normal(30, 50, seed=seed)).mul(normal(30, 50, seed=seed + 10) > 0.5) for seed in (1, 2, 3)]
DONORS = [BASE + change for change in SPARSE]


@pytest.fixture(autouse=True)
def small_slices(monkeypatch):
    monkeypatch.setattr(slices, "SLICE", 400)


def test_a_case_by_hand():
    # Changes (4, 1, 0, ε/2, 2) and (2, 0, 6, 0, 0): the first entry is shared, (4 + 2)/2; the fourth is no change.
    base = torch.full((5,), 10.0)
    donors = [base + torch.tensor([4.0, 1.0, 0.0, 0.25, 2.0]), base + torch.tensor([2.0, 0.0, 6.0, 0.0, 0.0])]
    assert merged(Ram(threshold=0.5), base, donors).tolist() == [13.0, 11.0, 16.0, 10.0, 12.0]
    assert merged(Ram(threshold=0.5, scale=2.0), base, donors).tolist() == [16.0, 12.0, 22.0, 10.0, 14.0]
    # One shared entry each; two unique ones of the first, one of the second: ½ and 1, of which at most ¾ counts.
    found = merged(Ram(threshold=0.5, boost=0.4, most=0.75), base, donors)
    assert found.tolist() == pytest.approx([13.0, 10 + 1.2, 10 + 6 * 1.3, 10.0, 10 + 2 * 1.2])


@pytest.mark.parametrize("boost", [0.0, 0.5])
def test_it_is_the_published_rule(boost):
    changes = torch.stack([(donor - BASE).flatten() for donor in DONORS])
    changed = changes.abs() > 1e-5
    times = changed.sum(0)
    unique, shared = changed & (times == 1), changed & (times > 1)
    factors = 1 + boost * (shared.sum(1) / unique.sum(1)).clamp(max=0.7)
    expected = (changes * unique * factors[:, None]).sum(0) + (changes * shared).sum(0) / times.clamp(min=1)
    found = merged(Ram(boost=boost, most=0.7), BASE, DONORS)
    assert torch.allclose(found, BASE + expected.view_as(BASE), atol=1e-6)
    assert unique.any(0).sum() > 100
    assert shared.any(0).sum() > 100


def test_donors_that_changed_other_entries_are_added_whole():
    mask = normal(30, 50, seed=9) > 0
    donors = [BASE + mask * SPARSE[0], BASE + ~mask * SPARSE[1]]
    assert torch.allclose(merged(Ram(boost=0.5), BASE, donors), merged(TaskArithmetic(), BASE, donors), atol=1e-6)


def test_donors_that_changed_the_same_entries_are_averaged_whatever_the_boost():
    donors = [BASE + 0.1 + normal(30, 50, seed=seed).abs() for seed in (1, 2)]
    assert torch.allclose(merged(Ram(boost=0.5), BASE, donors), merged(Linear(), BASE, donors), atol=1e-6)


def test_identical_donors_come_back_and_their_order_does_not_matter():
    assert torch.allclose(merged(Ram(), BASE, DONORS[:1] * 3), DONORS[0], atol=2e-5)  # changes of at most ε stay out
    assert torch.allclose(merged(Ram(boost=0.3), BASE, DONORS), merged(Ram(boost=0.3), BASE, DONORS[::-1]), atol=1e-6)
    assert torch.equal(merged(Ram(boost=0.3), BASE, [BASE, BASE]), BASE)


def test_over_one_tensor_both_scopes_are_alike_and_over_a_model_they_differ():
    settings = dict(boost=0.5, most=3.0)
    assert torch.equal(merged(Ram(**settings, scope="model"), BASE, DONORS), merged(Ram(**settings), BASE, DONORS))
    donors = [tiny(seed=0), tiny(seed=0)]
    with torch.no_grad():
        for number, donor in enumerate(donors):  # the head is changed by both in parts, one norm by the second alone
            donor.lm_head.weight[30 * number : 30 * number + 60] += 1
        donors[1].model.norm.weight += 1
    heads = {}
    for scope in ("tensor", "model"):
        model = mw.apply(tiny(seed=0), Ram(**settings, scope=scope), donors=donors)
        heads[scope] = (model.lm_head.weight - tiny(seed=0).lm_head.weight)[:, 0]
        grown = model.model.norm.weight - tiny(seed=0).model.norm.weight
        shared, unique = 30 * 64, 30 * 64 + 64
        assert grown.mean().item() == pytest.approx(1 if scope == "tensor" else 1 + 0.5 * shared / unique, rel=1e-5)
    assert heads["tensor"][[0, 40, 70]].tolist() == pytest.approx([1.5, 1.0, 1.5], rel=1e-5)
    assert heads["model"][[0, 40, 70]].tolist() == pytest.approx([1.5, 1.0, 1 + 0.5 * shared / unique], rel=1e-5)


def test_scale_zero_gives_the_model_bit_for_bit():
    assert torch.equal(merged(Ram(scale=0.0), BASE, DONORS), BASE)


def test_settings_by_role_need_the_scope_of_a_tensor():
    with pytest.raises(SettingError, match=r"merge\.ram: boost differs by role or depth, but all tensors compete"):
        Ram(boost={"mlp": 0.1}, scope="model")
    assert Ram(boost={"mlp": 0.1})
    with pytest.raises(SettingError, match="threshold must be a number of at least 0; got -1"):
        Ram(threshold=-1)

import math

import pytest
import torch
from calibration import normal
from merging import merged

from modelwright.core.errors import SettingError
from modelwright.maths import slices
from modelwright.methods.merge.karcher import Karcher
from modelwright.methods.merge.multislerp import Multislerp
from modelwright.methods.merge.slerp import Slerp

BASE = normal(30, 50)
DONORS = [normal(30, 50, seed=seed) for seed in (1, 2, 3)]


@pytest.fixture(autouse=True)
def small_slices(monkeypatch):
    monkeypatch.setattr(slices, "SLICE", 400)


def test_a_case_by_hand():
    # Axes of lengths 2 and 4 with weights 3 and 1: direction (3, 1)/√10, length (3·2 + 4)/4 = 2.5.
    donors = [torch.tensor([2.0, 0.0]), torch.tensor([0.0, 4.0])]
    found = merged(Multislerp(weights=[3, 1]), torch.zeros(2), donors)
    assert found.tolist() == pytest.approx([7.5 / math.sqrt(10), 2.5 / math.sqrt(10)])


@pytest.mark.parametrize("total", [1.0, 0.4, 3.0])
def test_it_is_the_published_step_through_the_tangent_space(total):
    weights = total * torch.tensor([0.2, 0.3, 0.5])
    units = torch.stack([donor.flatten() / donor.norm() for donor in DONORS])
    middle = weights @ units
    middle = middle / middle.norm()
    step = weights @ (units - (units @ middle)[:, None] * middle)
    assert step.norm() < 1e-6  # so that the exponential map is the identity
    length = sum(weight * donor.norm() for weight, donor in zip(weights, DONORS, strict=True))
    found = merged(Multislerp(weights=weights.tolist(), normalize=total == 1), BASE, DONORS)
    assert torch.allclose(found.flatten(), length * middle, atol=1e-5)


def test_weights_as_they_are_by_hand():
    # The direction stays (3, 1)/√10, and the length is 3·2 + 4 = 10. Directions that cancel leave 3·2 - 3·4 on the line.
    donors = [torch.tensor([2.0, 0.0]), torch.tensor([0.0, 4.0])]
    found = merged(Multislerp(weights=[3, 1], normalize=False), torch.zeros(2), donors)
    assert found.tolist() == pytest.approx([30 / math.sqrt(10), 10 / math.sqrt(10)])
    opposite = [torch.tensor([2.0, 0.0]), torch.tensor([-4.0, 0.0])]
    assert merged(Multislerp(weights=[3, 3], normalize=False), torch.zeros(2), opposite).tolist() == [-6.0, 0.0]
    assert merged(Multislerp(weights=[3, 3]), torch.zeros(2), opposite).tolist() == [-1.0, 0.0]


def test_weights_that_sum_to_one_need_no_division():
    for weights in ([0.2, 0.3, 0.5], [1.5, -0.5]):
        donors = DONORS[: len(weights)]
        assert torch.allclose(merged(Multislerp(weights=weights), BASE, donors),
                              merged(Multislerp(weights=weights, normalize=False), BASE, donors), atol=1e-6)  # fmt: skip


def test_equal_weights_of_two_are_slerp_half_way():
    donors = [donor / donor.norm() for donor in DONORS[:2]]
    assert torch.allclose(merged(Multislerp(), BASE, donors), merged(Slerp(), donors[0], donors[1:]), atol=1e-6)


def test_nearby_donors_have_nearly_their_karcher_mean():
    donors = [BASE + 0.1 * donor for donor in DONORS]
    assert torch.allclose(merged(Multislerp(), BASE, donors), merged(Karcher(), BASE, donors), atol=1e-4)


def test_identical_donors_are_returned_and_changes_come_back_on_top():
    assert torch.allclose(merged(Multislerp(weights=[1, 2]), BASE, DONORS[:1] * 2), DONORS[0])
    found = merged(Multislerp(from_base=True), BASE, [BASE + donor for donor in DONORS])
    assert torch.allclose(found - BASE, merged(Multislerp(), BASE, DONORS), atol=1e-5)
    assert torch.equal(merged(Multislerp(from_base=True), BASE, [BASE, BASE]), BASE)


def test_weights_without_a_mean_are_refused():
    with pytest.raises(SettingError, match=r"merge\.multislerp: the weights sum to 0"):
        Multislerp(weights=[1, -1])
    assert merged(Multislerp(weights=[1, -1], normalize=False), BASE, DONORS[:2]).isfinite().all()
    with pytest.raises(SettingError, match="2 weights for 3 donors"):
        merged(Multislerp(weights=[1, 2]), BASE, DONORS)


@pytest.mark.parametrize("settings", [{}, {"from_base": True}, {"normalize": False}], ids=str)
def test_one_donor_comes_back_bit_for_bit(settings):
    for seed in range(5):
        donor = normal(30, 50, seed=seed).double() * 10.0 ** normal(30, 50, seed=9)
        assert torch.equal(merged(Multislerp(**settings), BASE.double(), [donor]), donor)

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
    # Three axes of lengths 1, 2, 3: the middle is (1, 1, 1)/√3, of length 2.
    donors = list(torch.diag(torch.tensor([1.0, 2.0, 3.0])))
    assert merged(Karcher(), torch.zeros(3), donors).tolist() == pytest.approx([2 / math.sqrt(3)] * 3)


def test_two_donors_meet_half_way_on_the_arc():
    donors = [donor / donor.norm() for donor in DONORS[:2]]
    assert torch.allclose(merged(Karcher(), BASE, donors), merged(Slerp(), donors[0], donors[1:]), atol=1e-6)


def test_weights_move_the_mean_along_the_arc():
    donors = [donor / donor.norm() for donor in DONORS[:2]]
    found = merged(Karcher(weights=[3, 1], iterations=50, tolerance=1e-10), BASE, donors)
    assert torch.allclose(found, merged(Slerp(t=0.25), donors[0], donors[1:]), atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_donor_and_equal_donors_are_returned(dtype):
    donor = DONORS[0].to(dtype)
    for donors in ([donor], [donor] * 4):
        assert torch.allclose(merged(Karcher(), BASE.to(dtype), donors), donor)


def test_the_order_of_the_donors_does_not_matter():
    one = merged(Karcher(weights=[0.2, 0.3, 0.5]), BASE, DONORS)
    other = merged(Karcher(weights=[0.5, 0.2, 0.3]), BASE, [DONORS[2], DONORS[0], DONORS[1]])
    assert torch.allclose(one, other, atol=1e-6)


def test_changes_are_averaged_from_the_model():
    found = merged(Karcher(from_base=True), BASE, [BASE + donor for donor in DONORS])
    assert torch.allclose(found - BASE, merged(Karcher(), BASE, DONORS), atol=1e-5)


def test_empty_and_opposite_donors_are_merged_without_failing():
    assert merged(Karcher(), torch.zeros(3), [torch.zeros(3)] * 2).tolist() == [0.0] * 3
    assert merged(Karcher(), BASE, [DONORS[0], -DONORS[0]]).isfinite().all()
    lone = merged(Karcher(), BASE, [DONORS[0], torch.zeros(30, 50)])
    assert torch.allclose(lone, DONORS[0] / 2)  # its direction, and the mean of both lengths


def test_weights_without_a_mean_are_refused():
    with pytest.raises(SettingError, match=r"merge\.karcher: the weights sum to 0"):
        Karcher(weights=[1, -1])
    with pytest.raises(SettingError, match="2 weights for 3 donors"):
        merged(Karcher(weights=[1, 2]), BASE, DONORS)
    with pytest.raises(SettingError, match="iterations must be a whole number of at least 1; got 0"):
        Karcher(iterations=0)


def test_it_goes_on_until_a_step_is_short_or_its_iterations_are_spent():
    donors = list(torch.tensor([[1.0, 0.0, 0.0], [-0.5, 0.8, 0.0], [0.0, -0.3, 1.0]]))
    start = merged(Multislerp(), torch.zeros(3), donors)

    def left(**settings):
        """How far it is from the mean: the sum of the logarithms of the directions there."""
        found = merged(Karcher(**settings), torch.zeros(3), donors).double()
        found = found / found.norm()
        logs = []
        for donor in donors:
            unit = donor.double() / donor.double().norm()
            cosine = unit @ found
            logs.append(cosine.arccos() / (1 - cosine**2).sqrt() * (unit - cosine * found))
        return torch.stack(logs).sum(0).norm().item()

    steps = [left(iterations=count, tolerance=0.0) for count in (1, 3, 40)]
    assert steps[0] > 5 * steps[1] > 25 * steps[2]
    assert left(iterations=3) == steps[1]
    assert torch.equal(merged(Karcher(tolerance=3.2), torch.zeros(3), donors), start)  # no step is longer than half a turn

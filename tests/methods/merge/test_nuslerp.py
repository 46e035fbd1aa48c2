import pytest
import torch
from calibration import normal
from merging import merged
from tiny import tiny

import modelwright as mw
from modelwright.core.errors import NeedError, SettingError
from modelwright.maths import slices
from modelwright.methods.merge.nuslerp import Nuslerp
from modelwright.methods.merge.slerp import Slerp

BASE = normal(30, 50)
DONORS = [normal(30, 50, seed=seed) for seed in (1, 2)]


@pytest.fixture(autouse=True)
def small_slices(monkeypatch):
    monkeypatch.setattr(slices, "SLICE", 400)


def test_a_case_by_hand():
    # Weights 2 and 1: t = 1/3 between (3, 0) and (0, 4): sin 60° and sin 30°.
    base, donors = torch.tensor([9.0, 9.0]), [torch.tensor([3.0, 0.0]), torch.tensor([0.0, 4.0])]
    assert merged(Nuslerp(weights=[2, 1]), base, donors).tolist() == pytest.approx([3 * 0.8660254, 2.0])
    # The same changes of a base come back on top of it.
    changed = [base + donor for donor in donors]
    assert merged(Nuslerp(weights=[2, 1], from_base=True), base, changed).tolist() == pytest.approx([9 + 3 * 0.8660254, 11.0])


@pytest.mark.parametrize("t", [0.0, 0.3, 0.5, 1.0])
def test_it_is_slerp_for_weights_that_sum_to_one(t):
    ours = merged(Nuslerp(weights=[1 - t, t]), BASE, DONORS)
    assert torch.equal(ours, merged(Slerp(t=t), DONORS[0], DONORS[1:]))


def test_weights_that_cancel_mean_the_middle():
    assert torch.equal(merged(Nuslerp(weights=[1, -1]), BASE, DONORS), merged(Nuslerp(), BASE, DONORS))


@pytest.mark.parametrize("from_base", [True, False])
def test_rows_are_interpolated_one_by_one(from_base):
    found = merged(Nuslerp(weights=[0.7, 0.3], by_row=True, from_base=from_base), BASE, DONORS)
    for row in range(30):
        alone = merged(Nuslerp(weights=[0.7, 0.3], from_base=from_base), BASE[row], [donor[row] for donor in DONORS])
        assert torch.allclose(found[row], alone, atol=1e-6)
    assert not torch.allclose(found, merged(Nuslerp(weights=[0.7, 0.3], from_base=from_base), BASE, DONORS), atol=1e-3)


def test_donors_that_are_the_model_leave_it_as_it_is():
    for by_row in (True, False):
        assert torch.equal(merged(Nuslerp(from_base=True, by_row=by_row), BASE, [BASE, BASE]), BASE)


def test_another_number_of_donors_or_weights_is_refused():
    for donors in ([tiny()], [tiny()] * 3):
        with pytest.raises(NeedError, match=rf"merge\.nuslerp takes 2 donors; the step gives {len(donors)}"):
            mw.apply(tiny(), Nuslerp(), donors=donors)
    with pytest.raises(SettingError, match="3 weights for 2 donors"):
        merged(Nuslerp(weights=[1, 2, 3]), BASE, DONORS)


def test_weights_below_zero_count_by_their_share():
    assert torch.equal(merged(Nuslerp(weights=[-3, -1]), BASE, DONORS), merged(Nuslerp(weights=[3, 1]), BASE, DONORS))


def test_nearly_parallel_donors_are_still_joined_by_an_arc():
    # Unit vectors with the cosine .9999, where merge.slerp takes the line, on which half way has the length √((1 + .9999)/2).
    donors = [torch.tensor([1.0, 0.0]), torch.tensor([0.9999, (1 - 0.9999**2) ** 0.5])]
    assert merged(Nuslerp(), torch.zeros(2), donors).double().norm().item() == pytest.approx(1, abs=5e-7)
    line = merged(Slerp(), donors[0], donors[1:]).double().norm().item()
    assert line == pytest.approx(0.99995**0.5, abs=5e-7)

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


@pytest.mark.parametrize("from_base", [True, False])
def test_columns_are_interpolated_one_by_one(from_base):
    found = merged(Nuslerp(weights=[0.7, 0.3], by_column=True, from_base=from_base), BASE, DONORS)
    turned = merged(Nuslerp(weights=[0.7, 0.3], by_row=True, from_base=from_base), BASE.T, [donor.T for donor in DONORS])
    assert torch.allclose(found, turned.T, atol=1e-6)
    assert not torch.allclose(found, merged(Nuslerp(weights=[0.7, 0.3], by_row=True, from_base=from_base), BASE, DONORS), atol=1e-3)


def test_a_vector_is_one_column_and_of_a_convolution_the_first_index_runs():
    alone = [donor[0] for donor in DONORS]
    assert torch.allclose(merged(Nuslerp(by_column=True), BASE[0], alone), merged(Nuslerp(), BASE[0], alone), atol=1e-6)
    folded = [donor.view(30, 5, 10) for donor in DONORS]
    found = merged(Nuslerp(by_column=True), BASE.view(30, 5, 10), folded)
    assert torch.equal(found.view(30, 50), merged(Nuslerp(by_column=True), BASE, DONORS))


def test_columns_by_hand():
    # t = 1/3; column one turns from (3, 0) to (0, 4): sin 60° and sin 30°; column two is straight: (2·1 + 4)/3 and 0.
    donors = [torch.tensor([[3.0, 1.0], [0.0, 0.0]]), torch.tensor([[0.0, 4.0], [4.0, 0.0]])]
    found = merged(Nuslerp(weights=[2, 1], by_column=True), torch.zeros(2, 2), donors)
    assert found.flatten().tolist() == pytest.approx([3 * 0.8660254, 2.0, 2.0, 0.0])


def test_donors_that_are_the_model_leave_it_as_it_is():
    for way in ({}, {"by_row": True}, {"by_column": True}):
        assert torch.equal(merged(Nuslerp(from_base=True, **way), BASE, [BASE, BASE]), BASE)


def test_rows_and_columns_at_once_are_refused():
    with pytest.raises(SettingError, match="by_row and by_column are two ways to cut a matrix"):
        Nuslerp(by_row=True, by_column=True)


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

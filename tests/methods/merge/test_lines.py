import pytest
import torch
from calibration import normal
from merging import merged
from tiny import tiny

import modelwright as mw
from modelwright.core.errors import SettingError
from modelwright.maths import slices
from modelwright.methods.merge.lines import Lines
from modelwright.methods.merge.task_arithmetic import TaskArithmetic
from modelwright.methods.merge.ties import Ties

BASE = normal(30, 50)
DONORS = [BASE + 0.1 * normal(30, 50, seed=seed) for seed in (1, 2, 3)]


@pytest.fixture(autouse=True)
def small_slices(monkeypatch):
    monkeypatch.setattr(slices, "SLICE", 400)


def at_block(method, depth, depths=4):
    return method.at("mlp.up" if depth is not None else "embed", depth, depths)


def parameters(method, *, donors=(5, 6)):
    model = mw.apply(tiny(seed=1, num_hidden_layers=3), method, donors=[tiny(seed=seed, num_hidden_layers=3) for seed in donors])
    return dict(model.named_parameters())


def same(one, other):
    return all(torch.allclose(value, other[name], atol=1e-6) for name, value in one.items())


def test_a_case_by_hand():
    # α = .1, β = .6, block 1 of 4: .1 + .6/3 = .3 of the change 10. Outside .1, last .7. Two donors: α = ½ if not given.
    base, donors = torch.zeros(1), [torch.tensor([10.0])]
    for depth, expected in ((1, 3.0), (None, 1.0), (0, 1.0), (3, 7.0)):
        assert merged(at_block(Lines(start=0.1, rise=0.6), depth), base, donors).item() == pytest.approx(expected)
    assert merged(at_block(Lines(rise=0.6), 1), base, donors * 2).item() == pytest.approx(20 * (0.5 + 0.2))


def test_it_is_task_arithmetic_with_a_gradient():
    assert same(parameters(Lines(start=0.2, rise=0.7)), parameters(TaskArithmetic(scale=[0.2, 0.9])))


def test_without_rise_it_is_task_arithmetic_with_scale_start():
    assert same(parameters(Lines(start=0.3, rise=0.0)), parameters(TaskArithmetic(scale=0.3)))


def test_start_one_without_rise_leaves_the_donor_as_it_is():
    found = parameters(Lines(start=1.0, rise=0.0), donors=[5])
    assert same(found, dict(tiny(seed=5, num_hidden_layers=3).named_parameters()))


def test_a_single_block_is_the_last():
    assert merged(at_block(Lines(start=0.1, rise=0.6), 0, 1), torch.zeros(1), [torch.tensor([10.0])]).item() == pytest.approx(7.0)


def test_it_commutes_with_the_addition_of_changes():
    method = at_block(Lines(start=0.2, rise=0.5), 2)
    apart = sum(merged(method, BASE, [donor]) - BASE for donor in DONORS)
    assert torch.allclose(merged(method, BASE, DONORS) - BASE, apart, atol=1e-6)


def test_summed_changes_start_at_one_over_their_number():
    assert same(parameters(Lines(rise=0.4)), parameters(Lines(start=0.5, rise=0.4)))


def test_other_merged_changes_start_with_the_size_of_the_sum():
    """α = (1/N)·‖Σ τ‖₁/‖τ_merged‖₁ over all tensors, τ_merged that of TIES."""
    settings = dict(keep=0.3, consensus=True, normalize=True)
    before, summed = dict(tiny(seed=1, num_hidden_layers=3).named_parameters()), parameters(TaskArithmetic())
    ties = parameters(Ties(keep=0.3, scope="model"))
    total = [sum((found[name] - value).abs().sum().item() for name, value in before.items()) for found in (summed, ties)]
    start = total[0] / total[1] / 2
    assert same(parameters(Lines(rise=0.4, **settings)), parameters(Ties(keep=0.3, scope="model", scale=[start, start + 0.4])))


def test_donors_that_are_the_model_leave_it():
    assert torch.equal(merged(Lines(), BASE, [BASE, BASE]), BASE)
    assert torch.equal(merged(Lines(scale=0.0), BASE, DONORS), BASE)


def test_shares_that_differ_by_role_are_refused():
    with pytest.raises(SettingError, match=r"merge\.lines: keep differs by role or depth, but all tensors compete"):
        Lines(keep={"mlp": 0.5})
    with pytest.raises(SettingError, match="rise must be a number of at least 0; got -1"):
        Lines(rise=-1)


def test_weights_count_in_what_the_scale_starts_with():
    """‖Σ wᵢτᵢ‖₁ over itself is 1, whatever the weights are: α stays 1/N."""
    assert same(parameters(Lines(rise=0.4, weights=[2, 0.5])), parameters(Lines(start=0.5, rise=0.4, weights=[2, 0.5])))

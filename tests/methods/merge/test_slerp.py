import pytest
import torch
from calibration import normal
from merging import merged
from tiny import tiny

import modelwright as mw
from modelwright.core.errors import NeedError, SettingError
from modelwright.maths import slices
from modelwright.methods.merge.slerp import Slerp

BASE, DONOR = normal(30, 50), normal(30, 50, seed=1)


@pytest.fixture(autouse=True)
def small_slices(monkeypatch):
    monkeypatch.setattr(slices, "SLICE", 400)


def test_a_case_by_hand():
    # (3, 0) and (0, 4) stand at 90°: at t = 1/3 the coefficients are sin 60° and sin 30°, of the vectors as they are.
    result = merged(Slerp(t=1 / 3), torch.tensor([3.0, 0.0]), [torch.tensor([0.0, 4.0])])
    assert result.tolist() == pytest.approx([3 * 0.8660254, 4 * 0.5])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zero_is_the_model_and_one_the_donor_bit_for_bit(dtype):
    base, donor = BASE.to(dtype), DONOR.to(dtype)
    assert torch.equal(merged(Slerp(t=0.0), base, [donor]), base)
    assert torch.equal(merged(Slerp(t=1.0), base, [donor]), donor)


def test_nearly_parallel_models_are_joined_by_a_line():
    donor = BASE + 1e-3 * DONOR  # its cosine with the model is above 0.9995
    assert torch.allclose(merged(Slerp(t=0.3), BASE, [donor]), 0.7 * BASE + 0.3 * donor, atol=1e-7)


@pytest.mark.parametrize(("cosine", "arc"), [(0.9, True), (0.9994, True), (0.9996, False), (-0.9994, True), (-0.9996, False)])
def test_a_line_is_taken_from_the_cosine_9995_on(cosine, arc):
    # Half way between unit vectors an arc has the length 1 and a line √((1 + cos)/2).
    first, second = torch.tensor([1.0, 0.0]), torch.tensor([cosine, (1 - cosine**2) ** 0.5])
    length = merged(Slerp(), first, [second]).double().norm().item()
    assert length == pytest.approx(1 if arc else ((1 + cosine) / 2) ** 0.5, abs=2e-5)


@pytest.mark.parametrize("donor", [BASE, -BASE, torch.zeros(30, 50)])
def test_equal_opposite_and_empty_tensors_are_merged_without_failing(donor):
    assert torch.allclose(merged(Slerp(t=0.3), BASE, [donor]), 0.7 * BASE + 0.3 * donor, atol=1e-6)


def test_small_shapes_are_merged():
    assert merged(Slerp(), torch.tensor(2.0), [torch.tensor(4.0)]).item() == 3.0
    assert merged(Slerp(), torch.zeros(3), [torch.zeros(3)]).tolist() == [0.0] * 3


def test_t_may_differ_by_depth_and_role():
    model, donor = tiny(seed=1), tiny(seed=5)
    before = {name: value.clone() for name, value in model.named_parameters()}
    mw.apply(model, Slerp(t={"mlp": [0.0, 1.0], "*": 0.0}), donors=[donor])
    last = max(int(name.split(".")[2]) for name in before if "layers" in name)
    for name, value in model.named_parameters():
        depth = int(name.split(".")[2]) if ".mlp." in name else 0
        expected = merged(Slerp(t=depth / last), before[name], [donor.get_parameter(name).data])
        assert torch.equal(value, expected), name
    up = "model.layers.{}.mlp.up_proj.weight"
    assert torch.equal(model.get_parameter(up.format(0)), before[up.format(0)])
    assert torch.equal(model.get_parameter(up.format(last)), donor.get_parameter(up.format(last)))
    assert not torch.equal(model.get_parameter(up.format(1)), before[up.format(1)])


def test_more_donors_and_a_t_beyond_the_ends_are_refused():
    with pytest.raises(NeedError, match=r"merge\.slerp takes 1 donor; the step gives 2\. Name that many under `donors:`"):
        mw.apply(tiny(), Slerp(), donors=[tiny(), tiny()])
    with pytest.raises(SettingError, match="t must be a number from 0 to 1; got 1.5"):
        Slerp(t=1.5)

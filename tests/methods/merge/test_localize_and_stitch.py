import pytest
import torch
from calibration import normal
from merging import merged
from tiny import tiny

import modelwright as mw
from modelwright.core.errors import SettingError
from modelwright.methods.merge.localize_and_stitch import LocalizeAndStitch

BASE = normal(30, 50)
DONORS = [BASE + 0.1 * normal(30, 50, seed=seed) for seed in (1, 2, 3)]


def test_a_case_by_hand():
    # Changes (4, -1, 3, .5) and (2, 6, -1, .1); half of each stays: entries 0 and 2, and 0 and 1.
    # Entry 0: mean of 5 and 3; entry 1 the second's 7, entry 2 the first's 4; entry 3 the base's 1.
    base = torch.ones(4)
    donors = [base + torch.tensor([4.0, -1.0, 3.0, 0.5]), base + torch.tensor([2.0, 6.0, -1.0, 0.1])]
    assert merged(LocalizeAndStitch(keep=0.5), base, donors).tolist() == [4.0, 7.0, 4.0, 1.0]
    # Weights 3 and 1: entry 0 is (3·5 + 3)/4 = 4.5. Half of the change: (4.5 - 1)/2 + 1 = 2.75, 4, 2.5, 1.
    assert merged(LocalizeAndStitch(keep=0.5, weights=[3, 1], scale=0.5), base, donors).tolist() == [2.75, 4.0, 2.5, 1.0]


def test_overlaps_are_counted_over_all_donors():
    base = torch.zeros(3)
    donors = [torch.tensor([3.0, 0, 0]), torch.tensor([6.0, 0, 0]), torch.tensor([0.0, 0, 9])]
    assert merged(LocalizeAndStitch(keep=0.34), base, donors).tolist() == [4.5, 0.0, 9.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_where_masks_are_disjoint_each_donors_entries_are_copied_bit_for_bit(dtype):
    base, donors = BASE.to(dtype), []
    for number in range(3):
        donors.append(base.clone())
        donors[-1][number::3] = DONORS[number].to(dtype)[number::3]
    result = merged(LocalizeAndStitch(keep=0.2), base, donors)
    for number, donor in enumerate(donors):
        change = (donor.float() - base.float()).abs()
        taken = change >= change.flatten().topk(int(0.2 * change.numel())).values.min()
        assert torch.equal(result[taken], donor[taken])
        assert torch.equal(result[number::3][~taken[number::3]], base[number::3][~taken[number::3]])


def test_where_fewer_entries_changed_than_are_kept_those_that_did_not_are_left_out():
    base = normal(1000)
    donors = [base.clone(), base.clone()]
    donors[0][:50] += 1
    donors[1][100:150] += 1
    result = merged(LocalizeAndStitch(keep=0.1), base, donors)
    assert torch.equal(result[:100], donors[0][:100])
    assert torch.equal(result[100:], donors[1][100:])


def test_with_every_change_it_is_the_average():
    assert torch.allclose(merged(LocalizeAndStitch(keep=1.0), BASE, DONORS), sum(DONORS) / 3, atol=1e-6)


def test_with_no_change_it_is_the_model():
    assert torch.equal(merged(LocalizeAndStitch(keep=0.0), BASE, DONORS), BASE)


def test_the_order_of_the_donors_does_not_matter():
    assert torch.allclose(merged(LocalizeAndStitch(), BASE, DONORS), merged(LocalizeAndStitch(), BASE, DONORS[::-1]), atol=1e-7)


def test_all_tensors_of_the_model_compete_but_the_embedding():
    model, donor = tiny(seed=1), tiny(seed=5)
    before = {name: value.clone() for name, value in model.named_parameters()}
    changes = {name: (donor.get_parameter(name) - value).abs() for name, value in before.items()}
    kept = torch.cat([change.flatten() for name, change in changes.items() if "embed" not in name])
    least = kept.topk(int(0.1 * len(kept))).values.min()
    mw.apply(model, LocalizeAndStitch(), donors=[donor])
    for name, value in before.items():
        expected = changes[name] >= least if "embed" not in name else torch.zeros_like(value, dtype=torch.bool)
        assert torch.equal(model.get_parameter(name), torch.where(expected, donor.get_parameter(name), value)), name


def test_a_wrong_number_of_weights_is_refused():
    with pytest.raises(SettingError, match="1 weights for 2 donors"):
        mw.apply(tiny(), LocalizeAndStitch(weights=[1]), donors=[tiny(), tiny()])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_model_and_the_donors_are_left_alone(dtype):
    tensors = [tensor.to(dtype) for tensor in (BASE, *DONORS)]
    before = [tensor.clone() for tensor in tensors]
    result = merged(LocalizeAndStitch(keep=1.0), tensors[0], tensors[1:])
    assert not torch.equal(result, tensors[0])
    assert all(torch.equal(one, two) for one, two in zip(tensors, before, strict=True))

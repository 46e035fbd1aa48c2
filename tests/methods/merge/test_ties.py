import pytest
import torch
from calibration import normal
from merging import merged
from tiny import tiny

import modelwright as mw
from modelwright.core.errors import ModelError, SettingError
from modelwright.maths import task_vectors
from modelwright.maths.slices import Joined
from modelwright.methods.merge.ties import Ties

BASE = normal(30, 50)
DONORS = [BASE + 0.1 * normal(30, 50, seed=seed) for seed in (1, 2, 3)]


def test_a_case_by_hand():
    # Changes (4, -1, 3, .5) and (2, 2, -5, .1); half of each stays: (4, 0, 3, 0) and (0, 2, -5, 0). Of the equal twos
    # the first is trimmed. Sums 4, 2, -2, 0 elect + + - +. What agrees: 4, 2, -5, none; each alone, so no division.
    base = torch.ones(4)
    donors = [base + torch.tensor([4.0, -1.0, 3.0, 0.5]), base + torch.tensor([2.0, 2.0, -5.0, 0.1])]
    assert merged(Ties(keep=0.5), base, donors).tolist() == [5.0, 3.0, -4.0, 1.0]
    # All stays: sums 6, 1, -2, .6 elect + + - +. Means of what agrees: (4+2)/2 = 3, 2, -5, (.5+.1)/2 = .3. λ = 2.
    assert merged(Ties(keep=1.0, scale=2.0), base, donors).tolist() == pytest.approx([7.0, 5.0, -9.0, 1.6])
    # Not divided: 6, 2, -5, .6.
    assert merged(Ties(keep=1.0, normalize=False), base, donors).tolist() == pytest.approx([7.0, 3.0, -4.0, 1.6])
    # Weights 1 and 3: sums 10, 5, -12, .8; means (4 + 3·2)/4 = 2.5, 2, -5, (.5 + 3·.1)/4 = .2.
    assert merged(Ties(keep=1.0, weights=[1, 3]), base, donors).tolist() == pytest.approx([3.5, 3.0, -4.0, 1.2])


def test_the_sign_goes_to_the_larger_mass_and_not_to_the_greater_number():
    changes = torch.tensor([[5.0], [-1.0], [-1.0]])
    assert merged(Ties(keep=1.0), torch.zeros(1), list(changes)).tolist() == [5.0]


def test_changes_that_cancel_elect_plus():
    assert merged(Ties(keep=1.0), torch.zeros(1), [torch.tensor([-2.0]), torch.tensor([2.0])]).tolist() == [2.0]


@pytest.mark.parametrize("keep", [0.1, 0.2, 0.55, 1.0])
@pytest.mark.parametrize("scale", [1.0, 0.4])
def test_it_is_the_published_algorithm(keep, scale):
    """Trim, elect, disjoint mean, as printed: all donors count alike."""
    changes = torch.stack([(donor - BASE).flatten() for donor in DONORS])
    for change in changes:
        change[change.abs().argsort(stable=True)[: change.numel() - int(keep * change.numel())]] = 0
    sign = torch.where(changes.sum(0) >= 0, 1.0, -1.0)
    agree = changes.sign() == sign
    mean = (changes * agree).sum(0) / agree.sum(0).clamp(min=1)
    expected = BASE + scale * mean.view_as(BASE)
    assert torch.allclose(merged(Ties(keep=keep, scale=scale), BASE, DONORS), expected, atol=1e-6)


def test_without_disagreement_and_trimming_it_is_task_arithmetic():
    donors = [BASE + normal(30, 50, seed=seed).abs() for seed in (1, 2)]
    arithmetic = task_vectors.merge(BASE, donors, [0.4, 0.7], consensus=False, normalize=False, scale=1.5).whole()
    ours = merged(Ties(keep=1.0, weights=[0.4, 0.7], scale=1.5, normalize=False), BASE, donors)
    assert torch.allclose(ours, arithmetic, atol=1e-6)


@pytest.mark.parametrize("weight", [1.0, 0.3])
def test_one_donor_that_keeps_all_is_returned(weight):
    assert torch.allclose(merged(Ties(keep=1.0, weights=[weight]), BASE, DONORS[:1]), DONORS[0], atol=1e-6)


def test_identical_donors_that_keep_all_are_returned():
    assert torch.allclose(merged(Ties(keep=1.0), BASE, DONORS[:1] * 4), DONORS[0], atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scale_zero_gives_the_model_bit_for_bit(dtype):
    base = BASE.to(dtype)
    assert torch.equal(merged(Ties(scale=0.0), base, [donor.to(dtype) for donor in DONORS]), base)


def test_the_order_of_the_donors_does_not_matter():
    one = merged(Ties(keep=0.3, weights=[0.2, 0.3, 0.5]), BASE, DONORS)
    other = merged(Ties(keep=0.3, weights=[0.5, 0.2, 0.3]), BASE, [DONORS[2], DONORS[0], DONORS[1]])
    assert torch.allclose(one, other, atol=1e-6)


def test_one_donor_changes_exactly_the_share_that_is_kept():
    result = merged(Ties(keep=0.2), BASE, DONORS[:1])
    assert (result != BASE).sum() == int(0.2 * BASE.numel())


def test_small_changes_of_bfloat16_models_are_not_lost():
    base = torch.full((64,), 256.0, dtype=torch.bfloat16)  # its neighbours are 254 and 258
    donors = [base + 2, base + 4]
    assert merged(Ties(keep=1.0), base, donors).tolist() == [260.0] * 64  # 256 + 3 = 259, and its even neighbour
    exact = merged(Ties(keep=1.0, weights=[3, 1]), base, donors)  # 256 + (3·2 + 4)/4 = 258.5, which rounds to 258
    assert exact.tolist() == [258.0] * 64


def test_a_tensor_of_one_entry_is_merged_without_failing():
    assert merged(Ties(keep=1.0), torch.ones(1), [torch.full((1,), 3.0)]).tolist() == [3.0]
    assert merged(Ties(keep=0.2), torch.ones(1), [torch.full((1,), 3.0)]).tolist() == [1.0]  # int(0.2 · 1) = 0 changes stay


def test_a_model_takes_on_its_donors_changes_in_every_tensor():
    model, donor = tiny(seed=1), tiny(seed=5)
    mw.apply(model, Ties(keep=1.0), donors=[donor])
    for name, value in model.named_parameters():
        assert torch.allclose(value, donor.get_parameter(name), atol=1e-6), name


def test_donors_of_another_shape_and_a_wrong_number_of_weights_are_refused():
    with pytest.raises(ModelError, match="other shapes"):
        mw.apply(tiny(), Ties(), donors=[tiny(intermediate_size=96)])
    with pytest.raises(SettingError, match="1 weights for 2 donors"):
        mw.apply(tiny(), Ties(weights=[1]), donors=[tiny(), tiny()])


def test_over_the_whole_model_all_tensors_compete():
    model, donor = tiny(seed=1), tiny(seed=5)
    before = {name: value.clone() for name, value in model.named_parameters()}
    with torch.no_grad():
        for number, value in enumerate(donor.parameters()):
            value.mul_(1 + number)
    changes = torch.cat([(donor.get_parameter(name) - value).flatten() for name, value in before.items()]).abs()
    least = changes.topk(int(0.2 * len(changes))).values.min()
    mw.apply(model, Ties(scope="model"), donors=[donor])
    for name, value in before.items():
        change = donor.get_parameter(name) - value
        assert torch.equal(model.get_parameter(name) != value, (change.abs() >= least) & (change != 0)), name


@pytest.mark.parametrize("rescale", ["l1", "inverse"])
def test_over_the_whole_model_every_donor_has_one_factor(rescale):
    # Changes of about 10 in one tensor and 0.1 in the other, but for one of 50: half of all is nearly all of the first.
    donors = [[10 * normal(30, 50, seed=seed), 0.1 * normal(40, 35, seed=seed)] for seed in (1, 2)]
    donors[0][1][3, 4] += 50.0
    bases, settings = [torch.zeros(30, 50), torch.zeros(40, 35)], dict(scope="model", keep=0.5, normalize=False, consensus=False)
    surveys = {how: Ties(rescale=how, **settings).survey(Joined(bases), [Joined(end) for end in donors]) for how in (rescale, "none")}
    for number, ends in enumerate(donors):
        plain, grown = (
            [Ties(rescale=how, **settings).tensor(base, [end], [survey[number]]).whole() for base, end in zip(bases, ends, strict=True)]
            for how, survey in reversed(surveys.items())
        )
        whole, kept = (sum(float(part.double().abs().sum()) for part in parts) for parts in (ends, plain))
        assert all(torch.allclose(one, (whole / kept if rescale == "l1" else 2) * two) for one, two in zip(grown, plain, strict=True))
        assert 1.001 < whole / kept < 1.1
    assert plain[1].count_nonzero() < grown[0].count_nonzero() / 10


def test_over_one_tensor_both_scopes_are_alike():
    assert torch.equal(merged(Ties(scope="model"), BASE, DONORS), merged(Ties(), BASE, DONORS))


def test_a_share_by_role_is_refused_where_all_tensors_compete():
    with pytest.raises(SettingError, match=r"merge\.ties: keep differs by role or depth, but all tensors compete"):
        Ties(scope="model", keep={"mlp": 0.1})


@pytest.mark.parametrize("scope", ["tensor", "model"])
def test_each_donor_may_keep_a_share_of_its_own(scope):
    # Of the first all changes stay, of the second the largest of four.
    donors = [torch.tensor([1.0, -1.0, 2.0, -2.0]), torch.tensor([8.0, -6.0, 4.0, 2.0])]
    found = merged(Ties(keep_each=[1.0, 0.25], normalize=False, scope=scope), torch.zeros(4), donors)
    assert found.tolist() == [9.0, -1.0, 2.0, -2.0]

import math

import pytest
import torch
from calibration import normal
from merging import merged
from tiny import tiny

import modelwright as mw
from modelwright.core.errors import SettingError
from modelwright.maths import slices
from modelwright.methods.merge.pcb import Pcb

BASE = normal(30, 50)
DONORS = [BASE + 0.1 * normal(30, 50, seed=seed) for seed in (1, 2, 3)]
FORMS = ["pairwise", "summed", "raw"]


@pytest.fixture(autouse=True)
def small_slices(monkeypatch):
    monkeypatch.setattr(slices, "SLICE", 400)


def published(changes, keep, clamp, form, weights):
    """The authors' steps, with whole tensors: [donors, n] -> (what is added [n], scores)."""
    sizes = changes.abs()
    low, high = sizes.quantile(clamp, dim=1, keepdim=True), sizes.quantile(1 - clamp, dim=1, keepdim=True)
    sizes = sizes.clamp(low, high)
    levels = (sizes - low) / (high - low)
    signed = changes.sign() * levels
    if form == "pairwise":
        agreement = torch.tanh(signed[:, None] * signed[None]).sum(1)
    else:
        compared = changes if form == "raw" else signed
        agreement = torch.tanh(compared * compared.sum(0))
    balance = torch.exp(len(changes) * levels**2) * agreement
    cut = balance.kthvalue(changes.shape[1] - int(keep * changes.shape[1]), dim=1, keepdim=True).values
    balance = balance.clamp(min=cut) - cut
    scores = balance / balance.amax(1, keepdim=True)
    values = weights[:, None] * changes.sign() * sizes
    return (values * scores).sum(0) / scores.sum(0).clamp(min=1e-12), scores


def test_a_case_by_hand():
    # One donor, changes 0 … 4, nothing clamped: ν = 0, ¼, ½, ¾, 1 and b = exp(ν²)·tanh(ν²) rises with ν. Of five, two
    # stay; one donor's mean is its change wherever its score is not 0.
    base, donor = torch.ones(5), torch.ones(5) + torch.tensor([0.0, -1.0, 2.0, -3.0, 4.0])
    assert merged(Pcb(keep=0.4, clamp=0.0), base, [donor]).tolist() == [1.0, 1.0, 1.0, -2.0, 5.0]


def test_two_donors_are_weighed_by_hand():
    # Both have ν = 0, ½, 1 (changes 0, 1, 2 and 0, 1, -2); keep 2 of 3 drops what has the least b. Donor 1: b = 0 at 0,
    # e^½·2 tanh ¼ at 1, e²·(tanh 1 - tanh 1) = 0 at 2: so only entry 1 is above the cut, with score 1 for both.
    base = torch.zeros(3)
    donors = [torch.tensor([0.0, 1.0, 2.0]), torch.tensor([0.0, 1.0, -2.0])]
    assert merged(Pcb(keep=0.67, clamp=0.0), base, donors).tolist() == [0.0, 1.0, 0.0]
    # keep all: the least of each goes, and entries 0 and 2 have none, so that 1 alone is above its cut again.
    assert merged(Pcb(keep=1.0, clamp=0.0), base, donors).tolist() == [0.0, 1.0, 0.0]
    # Three donors, changes (0, 1, 2), (0, 1, 2) and (0, 2, -1), with ν in halves: at 1 each of the first has
    # b = e^¾·(2 tanh ¼ + tanh ½) and the third e³·(2 tanh ½ + tanh 1); at 2 each of the first e³·(2 tanh 1 - tanh ½) and the
    # third e^¾·(tanh ¼ - 2 tanh ½) < 0, its least. Scores from the least to the largest of each, 0 at 0 of the first two.
    donors = [torch.tensor([0.0, 1.0, 2.0])] * 2 + [torch.tensor([0.0, 2.0, -1.0])]
    small = math.exp(0.75) * (2 * math.tanh(0.25) + math.tanh(0.5)) / (math.exp(3) * (2 * math.tanh(1) - math.tanh(0.5)))
    low, high = math.exp(0.75) * (math.tanh(0.25) - 2 * math.tanh(0.5)), math.exp(3) * (2 * math.tanh(0.5) + math.tanh(1))
    zero = -low / (high - low)  # what the third's 0 scores; it adds nothing
    assert 0 < zero < 0.1
    expected = [0.0, (2 * small * 1 + 2) / (2 * small + 1), 2.0]
    assert merged(Pcb(keep=1.0, clamp=0.0), base, donors).tolist() == pytest.approx(expected)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("keep", [0.05, 0.3])
def test_it_is_the_published_algorithm(form, keep):
    changes = torch.stack([(donor - BASE).flatten() for donor in DONORS]).double()
    weights = torch.tensor([1.0, 1.2, 0.8]).double()
    added, scores = published(changes, keep, 0.01, form, weights)
    found = merged(Pcb(keep=keep, agreement=form, weights=weights.tolist(), scale=1.5), BASE, DONORS)
    assert torch.allclose(found, BASE + 1.5 * added.view_as(BASE).float(), atol=1e-6)
    assert ((scores > 0).sum(1) == int(keep * changes.shape[1])).all()
    assert scores.min() == 0
    assert scores.max() == 1


@pytest.mark.parametrize("form", FORMS)
def test_identical_donors_add_their_change_where_it_is_kept(form):
    found = merged(Pcb(keep=0.2, clamp=0.0, agreement=form), BASE, DONORS[:1] * 4)
    moved = found != BASE
    assert moved.sum() == int(0.2 * BASE.numel())
    assert torch.allclose(found[moved], DONORS[0][moved], atol=1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_no_entry_moves_further_than_the_furthest_donor(form):
    largest = torch.stack([(donor - BASE).abs() for donor in DONORS]).amax(0)
    moved = (merged(Pcb(keep=1.0, clamp=0.0, agreement=form), BASE, DONORS) - BASE).abs()
    assert (moved <= largest + 1e-6).all()


def test_the_order_of_the_donors_does_not_matter():
    assert torch.allclose(merged(Pcb(), BASE, DONORS), merged(Pcb(), BASE, DONORS[::-1]), atol=1e-6)


def test_changes_that_are_all_alike_and_small_tensors_do_not_fail():
    assert merged(Pcb(), BASE, [BASE + 1, BASE + 1]).isfinite().all()
    assert torch.equal(merged(Pcb(), BASE, [BASE, BASE]), BASE)
    for scope in ("model", "tensor"):
        assert merged(Pcb(scope=scope), torch.ones(1), [torch.full((1,), 3.0)]).tolist() == [1.0]


def test_over_one_tensor_both_scopes_are_alike_and_over_a_model_they_differ():
    assert torch.equal(merged(Pcb(scope="tensor"), BASE, DONORS), merged(Pcb(), BASE, DONORS))
    before, moved = dict(tiny(seed=1).named_parameters()), {}
    for scope in ("model", "tensor"):
        donor = tiny(seed=5)
        with torch.no_grad():
            donor.lm_head.weight.mul_(10)
        model = mw.apply(tiny(seed=1), Pcb(scope=scope), donors=[donor])
        moved[scope] = {name: (value != before[name]).sum().item() for name, value in model.named_parameters()}
    assert sum(moved["model"].values()) == pytest.approx(0.1 * sum(value.numel() for value in before.values()), abs=2)
    for name in ("lm_head.weight", "model.layers.0.mlp.up_proj.weight"):
        assert moved["tensor"][name] == int(0.1 * before[name].numel())
    assert moved["model"]["lm_head.weight"] > moved["tensor"]["lm_head.weight"]  # the greatest changes are there


def test_scale_zero_gives_the_model_bit_for_bit():
    assert torch.equal(merged(Pcb(scale=0.0), BASE, DONORS), BASE)


def test_shares_by_role_need_the_scope_of_a_tensor():
    with pytest.raises(SettingError, match=r"merge\.pcb: keep differs by role or depth, but all tensors compete"):
        Pcb(keep={"mlp": 0.1})
    assert Pcb(keep={"mlp": 0.1}, scope="tensor")
    with pytest.raises(SettingError, match="clamp must be a number from 0 to 0.49; got 0.5"):
        Pcb(clamp=0.5)


def test_an_empty_tensor_stays_empty():
    assert merged(Pcb(scope="tensor"), torch.zeros(0, 4), [torch.zeros(0, 4)]).shape == (0, 4)

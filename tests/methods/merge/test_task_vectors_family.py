"""What must hold of every method of generalised task arithmetic, and what tells them apart."""

import pytest
import torch
from calibration import normal
from merging import merged

import modelwright as mw
from modelwright.core.errors import SettingError
from modelwright.maths import slices
from modelwright.methods.merge.breadcrumbs import Breadcrumbs
from modelwright.methods.merge.consensus import Consensus
from modelwright.methods.merge.dare import Dare
from modelwright.methods.merge.della import Della
from modelwright.methods.merge.linear import Linear
from modelwright.methods.merge.lines import Lines
from modelwright.methods.merge.nearswap import Nearswap
from modelwright.methods.merge.pcb import Pcb
from modelwright.methods.merge.ram import Ram
from modelwright.methods.merge.sce import Sce
from modelwright.methods.merge.task_arithmetic import TaskArithmetic
from modelwright.methods.merge.ties import Ties

BASE = normal(30, 50)
DONORS = [BASE + 0.1 * normal(30, 50, seed=seed) for seed in (1, 2, 3)]
KINDS = [TaskArithmetic, Ties, Dare, Della, Breadcrumbs]
WHOLE = {TaskArithmetic: {}, Ties: {"keep": 1.0}, Dare: {"keep": 1.0}, Della: {"keep": 1.0, "spread": 0.0}, Breadcrumbs: {"keep": 1.0}}


@pytest.fixture(autouse=True)
def small_slices(monkeypatch):
    monkeypatch.setattr(slices, "SLICE", 400)


def arithmetic(weights, scale=1.0):
    return BASE + scale * sum(weight * (donor - BASE) for weight, donor in zip(weights, DONORS, strict=True))


def test_task_arithmetic_by_hand():
    # Changes (2, -4) and (1, 1), weights 1 and -2, λ = ½: 10 + ½·(2 - 2) = 10, 10 + ½·(-4 - 2) = 7.
    base = torch.tensor([10.0, 10.0])
    donors = [base + torch.tensor([2.0, -4.0]), base + torch.tensor([1.0, 1.0])]
    assert merged(TaskArithmetic(weights=[1, -2], scale=0.5), base, donors).tolist() == [10.0, 7.0]


@pytest.mark.parametrize("kind", KINDS)
def test_keeping_all_without_consensus_is_task_arithmetic(kind):
    weights = [0.4, -0.2, 0.7]
    method = kind(**WHOLE[kind], weights=weights, scale=1.5, consensus=False, normalize=False)
    assert torch.allclose(merged(method, BASE, DONORS), arithmetic(weights, 1.5), atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_scale_zero_gives_the_base_bit_for_bit(kind):
    assert torch.equal(merged(kind(scale=0.0), BASE, DONORS), BASE)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("consensus", [True, False])
def test_identical_donors_normalised_are_that_donor(kind, consensus):
    method = kind(**WHOLE[kind], normalize=True, consensus=consensus)
    assert torch.allclose(merged(method, BASE, [DONORS[0]] * 4), DONORS[0], atol=1e-6)


@pytest.mark.parametrize("kind", [TaskArithmetic, Ties, Breadcrumbs])
@pytest.mark.parametrize("consensus", [True, False])
def test_the_order_of_the_donors_does_not_matter(kind, consensus):
    one = kind(weights=[0.2, 0.3, 0.5], consensus=consensus)
    other = kind(weights=[0.5, 0.2, 0.3], consensus=consensus)
    assert torch.allclose(merged(one, BASE, DONORS), merged(other, BASE, [DONORS[2], DONORS[0], DONORS[1]]), atol=1e-6)


@pytest.mark.parametrize("consensus", [True, False])
def test_weights_that_sum_to_one_are_the_average(consensus):
    weights = [0.2, 0.3, 0.5]
    method = TaskArithmetic(weights=weights, normalize=not consensus)
    assert torch.allclose(merged(method, BASE, DONORS), merged(Linear(weights=weights), BASE, DONORS), atol=1e-6)


def test_an_analogy_and_forgetting_are_weights():
    analogy = merged(TaskArithmetic(weights=[1, -1]), BASE, DONORS[:2])
    assert torch.allclose(analogy, BASE + DONORS[0] - DONORS[1], atol=1e-6)
    assert torch.allclose(merged(TaskArithmetic(weights=[-0.5]), BASE, DONORS[:1]), BASE - 0.5 * (DONORS[0] - BASE), atol=1e-6)


@pytest.mark.parametrize("kind", [Dare, Della])
def test_masks_come_from_the_seed(kind):
    method = kind(keep=0.5)
    assert torch.equal(merged(method, BASE, DONORS, seed=1), merged(method, BASE, DONORS, seed=1))
    assert not torch.equal(merged(method, BASE, DONORS, seed=1), merged(method, BASE, DONORS, seed=2))


@pytest.mark.parametrize("kind", [Dare, Della])
def test_every_donor_has_a_mask_of_its_own(kind):
    donors = [torch.ones(50, 40), 2 * torch.ones(50, 40)]
    found = merged(kind(keep=0.5, rescale="none", consensus=False, normalize=False), torch.zeros(50, 40), donors)
    assert {value: (found == value).float().mean().item() for value in (0.0, 1.0, 2.0, 3.0)} == pytest.approx(
        dict.fromkeys((0.0, 1.0, 2.0, 3.0), 0.25), abs=0.06
    )


def test_della_is_dropped_elected_and_divided_unless_asked_otherwise():
    """Della's own settings are mergekit's: consensus, normalize, and sizes brought to the sum that they had."""
    stated = Della(keep=0.6, spread=0.15, consensus=True, normalize=True, rescale="l1", scale=1.0, raw_votes=False)
    assert torch.equal(merged(Della(keep=0.6), BASE, DONORS, seed=4), merged(stated, BASE, DONORS, seed=4))
    one = merged(Della(keep=0.6), torch.zeros(30, 50), DONORS[:1], seed=4)  # one donor: what stays has the sum of sizes of all
    assert one.abs().sum().item() == pytest.approx(DONORS[0].abs().sum().item(), rel=1e-5)
    assert (one == 0).float().mean().item() == pytest.approx(0.4, abs=0.06)


def test_dropped_changes_keep_their_expectation():
    draws = torch.stack([merged(Dare(keep=0.5, weights=[0.4, -0.2, 0.7]), BASE, DONORS, seed=seed) for seed in range(400)])
    error = (draws.mean(0) - arithmetic([0.4, -0.2, 0.7])).abs()
    spread = draws.std(0) / 400**0.5
    assert (error < 5 * spread + 1e-6).all()


def test_dare_keeps_about_the_share_and_makes_up_for_it():
    change = merged(Dare(keep=0.25), torch.zeros(100, 100), [torch.ones(100, 100)])
    assert set(change.unique().tolist()) == {0.0, 4.0}
    assert abs((change != 0).float().mean() - 0.25) < 5 * (0.25 * 0.75 / 10_000) ** 0.5
    l1 = merged(Dare(keep=0.25, rescale="l1"), torch.zeros(30, 50), DONORS[:1])
    assert l1.abs().sum().item() == pytest.approx(DONORS[0].abs().sum().item(), rel=1e-5)
    plain = merged(Dare(keep=0.25, rescale="none"), torch.zeros(30, 50), DONORS[:1])
    assert torch.equal(plain[plain != 0], DONORS[0][plain != 0])


def test_della_keeps_larger_changes_more_often():
    rows = torch.arange(1.0, 1001).repeat(50, 1)
    rows = rows.gather(1, normal(50, 1000).argsort(1))
    kept = merged(Della(keep=0.5, spread=0.4, rescale="none", consensus=False, normalize=False), torch.zeros(50, 1000), [rows]) != 0
    # p = 0.1 + 0.8 · (rank - 1)/999; the rank is the value itself.
    for low, high in ((1, 200), (401, 600), (801, 1000)):
        inside = kept[(rows >= low) & (rows <= high)].float()
        expected = 0.1 + 0.8 * ((low + high) / 2 - 1) / 999
        assert abs(inside.mean() - expected) < 5 * (0.25 / len(inside)) ** 0.5


def test_each_donor_of_della_may_have_a_spread_of_its_own():
    plain = {"keep": 0.5, "consensus": False, "normalize": False}
    whole = merged(Della(**plain, spread_each=[0.4, 0.1]), BASE, DONORS[:2]) - BASE
    one = merged(Della(**plain, spread=0.4, weights=[1, 0]), BASE, DONORS[:2]) - BASE
    two = merged(Della(**plain, spread=0.1, weights=[0, 1]), BASE, DONORS[:2]) - BASE
    assert torch.allclose(whole, one + two, atol=1e-6)
    assert not torch.allclose(whole, merged(Della(**plain, spread=0.4), BASE, DONORS[:2]) - BASE, atol=1e-3)
    with pytest.raises(SettingError, match="1 spread_each for 2 donors"):
        merged(Della(spread_each=[0.1]), BASE, DONORS[:2])
    with pytest.raises(SettingError, match="spread_each are fractions from 0 to 1; got 2.0"):
        Della(spread_each=[2.0])


def test_della_of_a_row_of_one_entry_is_dare():
    base, donor = torch.zeros(500, 1), torch.ones(500, 1)
    assert torch.equal(merged(Della(keep=0.3, rescale="inverse", consensus=False, normalize=False), base, [donor]),
                       merged(Dare(keep=0.3), base, [donor]))  # fmt: skip


def test_breadcrumbs_by_hand():
    # Ten changes 1 ... 10, keep 0.6, top 0.2: 10 and 9 go as outliers, and of the smallest 1 and 2.
    change = torch.tensor([3.0, -10.0, 1.0, 7.0, -2.0, 9.0, 4.0, -5.0, 8.0, 6.0])
    result = merged(Breadcrumbs(keep=0.6, top=0.2), torch.zeros(10), [change])
    assert result.tolist() == [3.0, 0.0, 0.0, 7.0, 0.0, 0.0, 4.0, -5.0, 8.0, 6.0]
    # keep 0.9, top 0.2: only one has to go, so one of the largest goes.
    assert merged(Breadcrumbs(keep=0.9, top=0.2), torch.zeros(10), [change]).abs().max() == 9
    # top of ten entries is no whole one: nothing of the largest goes, and nothing else is lost.
    assert merged(Breadcrumbs(keep=0.9, top=0.05), torch.zeros(10), [change]).abs().min() == 0
    assert (merged(Breadcrumbs(keep=1.0, top=0.05), torch.zeros(10), [change]) == change).all()
    # keep 0.5, top 0.3: 10, 9 and 8 go, and 1 and 2. By itself it keeps .9 and leaves out .01 of the largest.
    result = merged(Breadcrumbs(keep=0.5, top=0.3), torch.zeros(10), [change])
    assert result.tolist() == [3.0, 0.0, 0.0, 7.0, 0.0, 0.0, 4.0, -5.0, 0.0, 6.0]
    kept = merged(Breadcrumbs(), torch.zeros(1000), [torch.arange(1.0, 1001)]).nonzero()[:, 0]
    assert kept.tolist() == list(range(90, 990))
    # Each donor may lose a share of its own: of the second none.
    each = merged(Breadcrumbs(keep=0.8, top_each=[0.2, 0.0]), torch.zeros(10), [change, 100 * change])
    assert each.tolist() == [303.0, -1000.0, 1.0, 707.0, -2.0, 900.0, 404.0, -505.0, 808.0, 606.0]
    with pytest.raises(SettingError, match="1 top_each for 2 donors"):
        merged(Breadcrumbs(top_each=[0.2]), torch.zeros(10), [change, change])


def test_raw_votes_elect_without_weights():
    donors = [torch.tensor([1.0]), torch.tensor([-0.6])]
    settings = {"keep": 1.0, "weights": [0.1, 1.0]}
    assert merged(Ties(**settings), torch.zeros(1), donors).item() == pytest.approx(-0.6)
    assert merged(Ties(**settings, raw_votes=True), torch.zeros(1), donors).item() == pytest.approx(1.0)


def test_what_is_trimmed_is_made_up_for_by_hand():
    # Changes 1, 2, 3, 4, 10: the two largest are 14 of 20; without the largest, 3 and 4 are 7 of 20.
    change, alone = torch.tensor([1.0, -2.0, 3.0, -4.0, 10.0]), {"normalize": False, "consensus": False}
    found = {rescale: merged(Ties(keep=0.4, rescale=rescale, **alone), torch.zeros(5), [change]) for rescale in ("none", "l1", "inverse")}
    assert found["none"].tolist() == [0, 0, 0, -4, 10]
    assert found["l1"].tolist() == pytest.approx([0, 0, 0, -4 * 20 / 14, 10 * 20 / 14])
    assert found["inverse"].tolist() == pytest.approx([0, 0, 0, -10, 25])
    crumbs = merged(Breadcrumbs(keep=0.4, top=0.2, rescale="l1"), torch.zeros(5), [change])
    assert crumbs.tolist() == pytest.approx([0, 0, 3 * 20 / 7, -4 * 20 / 7, 0])


@pytest.mark.parametrize("kind", [Ties, Breadcrumbs, Dare, Della])
def test_every_donor_keeps_its_sum_of_sizes(kind):
    """Before it is weighed and put to the vote; 0 of what nothing is kept of, or what has not changed."""
    for donor in DONORS:
        found = merged(kind(keep=0.3, rescale="l1", normalize=False, consensus=False), torch.zeros(30, 50), [donor])
        assert found.abs().sum().item() == pytest.approx(donor.abs().sum().item(), rel=1e-5)
        assert 0 < (found != 0).float().mean() < 0.4
    assert torch.equal(merged(kind(rescale="l1"), BASE, [BASE, BASE]), BASE)
    assert torch.equal(merged(kind(rescale="l1", keep_each=[0.0]), BASE, DONORS[:1]), BASE)


def test_sizes_are_made_up_for_in_both_scopes_of_ties():
    settings = dict(keep=0.3, rescale="l1")
    assert torch.equal(merged(Ties(**settings, scope="model"), BASE, DONORS), merged(Ties(**settings), BASE, DONORS))


def test_each_donor_may_keep_its_own_share():
    result = merged(Ties(keep_each=[1.0, 0.0], consensus=False, normalize=False), BASE, DONORS[:2])
    assert torch.allclose(result, DONORS[0], atol=1e-6)
    with pytest.raises(SettingError, match="1 keep_each for 2 donors"):
        merged(Ties(keep_each=[1.0]), BASE, DONORS[:2])


@pytest.mark.parametrize("kind", [Ties, Breadcrumbs, Dare, Della])
def test_a_rescaling_that_is_unknown_is_refused(kind):
    with pytest.raises(SettingError, match="rescale must be one of 'inverse', 'l1', 'none'; got 'sometimes'"):
        kind(rescale="sometimes")


def test_deltas_of_bfloat16_models_are_not_lost():
    base = torch.full((64,), 256.0, dtype=torch.bfloat16)
    donors = [base + 2, base + 4]
    assert merged(TaskArithmetic(weights=[0.5, 0.5]), base, donors).tolist() == [260.0] * 64  # 259, and its even neighbour


@pytest.mark.parametrize("kind", [*KINDS, Ram, Pcb, Lines, Consensus, Nearswap, Sce])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_neutral_settings_give_the_base_bit_for_bit_in_every_dtype(kind, dtype):
    base = (BASE.double() / 3).to(dtype)
    donors = [(base.double() + 0.1 * normal(30, 50, seed=seed)).to(dtype) for seed in (1, 2)]
    assert torch.equal(merged(kind(**kind.neutral), base, donors[: kind.takes[1]]), base)


@pytest.mark.parametrize("kind", KINDS)
def test_changes_of_float64_models_are_not_rounded(kind):
    """One is 1e-12, which float32 loses beside 1, and sums keep every digit."""
    base = BASE.double()
    donors = [base + 0.1 * normal(30, 50, seed=seed).double() for seed in (1, 2)]
    base[0, 0] = 1.0
    donors[0][0, 0] = donors[1][0, 0] = 1.0 + 1e-12
    found = merged(kind(**WHOLE[kind], consensus=False, normalize=False), base, donors)
    assert torch.allclose(found, sum(donors) - base, rtol=0, atol=1e-14)


@pytest.mark.parametrize("kind", [Ties, Breadcrumbs])
def test_what_is_trimmed_of_float64_models_is_exact(kind):
    base, random = torch.zeros(30, 50, dtype=torch.float64), torch.Generator().manual_seed(0)
    change = 1 + 1e-10 * torch.randperm(1500, generator=random).double().view(30, 50)  # all alike in float32
    for settings in ({}, {"scope": "model"}) if kind is Ties else ({"top": 0.0},):
        found = merged(kind(keep=0.2, consensus=False, normalize=False, **settings), base, [change])
        assert torch.equal(found, change * (change >= change.flatten().topk(300).values.min()))


def test_della_ranks_float64_changes_exactly():
    rows = 1 + 1e-10 * normal(50, 1000).argsort(1).argsort(1).double()
    method = Della(keep=0.5, spread=0.4, rescale="none", consensus=False, normalize=False)
    kept = merged(method, torch.zeros(50, 1000, dtype=torch.float64), [rows]) != 0
    low, high = (kept[mask].float().mean().item() for mask in (rows < 1 + 200e-10, rows >= 1 + 800e-10))
    assert low == pytest.approx(0.1 + 0.8 * 99.5 / 999, abs=5 * (0.25 / 10_000) ** 0.5)
    assert high == pytest.approx(0.1 + 0.8 * 899.5 / 999, abs=5 * (0.25 / 10_000) ** 0.5)


@pytest.mark.parametrize("settings", [
    {"keep": 0.1}, {"keep": 0.9}, {"keep": 0.15}, {"spread": 0.5}, {"keep_each": [0.5, 0.1]}, {"keep": 0.3, "spread_each": [0.1, 0.4]},
    {"keep_each": [0.5, 0.2], "spread_each": [0.4, 0.3]},
])  # fmt: skip
def test_probabilities_of_della_that_are_none_are_refused(settings):
    with pytest.raises(SettingError, match=r"merge\.della: keep 0\.\d+ and spread 0\.\d+ make probabilities from .*Lower spread"):
        Della(**settings)


def test_della_keeps_all_or_nothing_whatever_the_spread_and_checks_settings_by_role_at_their_place():
    assert Della(keep_each=[1.0, 0.0, 0.3]).keeps(3) == [1.0, 0.0, 0.3]
    method = Della(keep={"mlp": 0.5, "attn": 0.1}, spread=0.15)
    assert method.at("mlp.up", 0, 4).keep == 0.5
    with pytest.raises(SettingError, match=r"keep 0\.1 and spread 0\.15"):
        method.at("attn.q", 0, 4)


def test_masks_do_not_depend_on_the_order_of_the_tensors(tmp_path):
    from tiny import tiny

    folders = []
    for seed in range(2):
        folders.append(tmp_path / str(seed))
        tiny("llama", seed).save_pretrained(folders[-1])
    streamed = mw.apply(folders[0], Dare(keep=0.4), donors=folders[1:], save=tmp_path / "streamed", seed=3)
    held = mw.apply(tiny("llama", 0), Dare(keep=0.4), donors=[tiny("llama", 1)], seed=3)
    for name, value in held.named_parameters():
        assert torch.equal(value, streamed.module.get_parameter(name)), name


def test_weights_that_cancel_are_no_divisor():
    weights = [0.1, 0.2, -0.3]  # their sum is 5e-17
    assert torch.allclose(merged(TaskArithmetic(weights=weights, normalize=True), BASE, DONORS), arithmetic(weights), atol=1e-6)
    with pytest.raises(SettingError, match="sum to 0"):
        Linear(weights=weights)


def test_a_donor_of_which_nothing_is_kept_adds_nothing():
    for kind in (Dare, Della):
        found = merged(kind(keep_each=[1.0, 0.0], consensus=False, normalize=False), BASE, DONORS[:2])
        assert torch.allclose(found, DONORS[0], atol=1e-6)


def test_shares_and_weights_out_of_range_are_refused():
    for kind in (Ties, Dare, Della, Breadcrumbs):
        with pytest.raises(SettingError, match="keep_each are fractions from 0 to 1; got 2.5"):
            kind(keep_each=[2.5, 0.1])
        with pytest.raises(SettingError, match="weights are numbers; got nan"):
            kind(weights=[float("nan")])
        for wrong in (-0.01, 1.01, float("nan")):
            with pytest.raises(SettingError, match="keep_each are fractions from 0 to 1"):
                kind(keep_each=[wrong])
    with pytest.raises(SettingError, match="top_each are fractions from 0 to 1; got 1.01"):
        Breadcrumbs(top_each=[0.5, 1.01])


def test_a_donor_with_nan_is_refused_before_work(tmp_path, monkeypatch):
    from tiny import tiny

    from modelwright.core.errors import WeightsError
    from modelwright.core.weights import Writer

    begun = []
    monkeypatch.setattr(Writer, "__init__", lambda *_, **__: begun.append("a folder"))
    donor = tiny(seed=1)
    with torch.no_grad():
        donor.lm_head.weight[0, 0] = float("nan")
    donor.save_pretrained(tmp_path / "donor")
    tiny(seed=0).save_pretrained(tmp_path / "base")
    with pytest.raises(WeightsError, match=r"lm_head.weight has 1 values"):
        mw.apply(tmp_path / "base", Ties(), donors=[tmp_path / "donor"], save=tmp_path / "out")
    assert not begun
    assert not (tmp_path / "out").exists()

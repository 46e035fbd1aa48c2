import pytest
import torch
from calibration import TEXT, blocks_of, lettered, normal

import modelwright as mw
from modelwright.core import data as texts
from modelwright.core.errors import SettingError
from modelwright.core.gradients import gradient_moments
from modelwright.methods.prune.gaprune import SMALLEST, GaPrune, aligned
from modelwright.methods.prune.magnitude import Magnitude


def ranks(score):
    return score.flatten().argsort(stable=True)


def seen(seed=0):
    """A weight, two mean gradients and two mean squares."""
    return [normal(12, 16, seed=seed + n) for n in range(3)] + [normal(12, 16, seed=seed + n).square() * 1e-6 for n in (3, 4)]


def score(method, *given):
    fisher, size = method.terms(*given)
    return fisher + size


def test_a_case_by_hand():
    # F of 4 and 9 in the domain and 1 and 3 in general, β = 2: 2·3 = 6 and 3·2 = 6 times |w|... with |w| of 4 and 1: 8 and 3.
    # The gradients (3, 4) and (4, 3) have the product (12, 12) / 25 · 2 = 0.96 of mean 0.96: 1 + 0.2 · 0.96 = 1.192.
    method = GaPrune(against=2.0, size=0.5, scales="published")
    given = [torch.tensor([[4.0, -1.0]]), *(torch.tensor([pair]) for pair in ([3.0, 4.0], [4.0, 3.0], [4.0, 9.0], [1.0, 3.0]))]
    assert score(method, *given).tolist()[0] == pytest.approx([8 * 1.192 + 0.5 * 2, 3 * 1.192 + 0.5 * 1], rel=1e-5)


def test_alignment_by_hand():
    # Of 3 × 3 equal entries every product of gradients of mean square 1 is 1; opposed gradients give -1.
    one = torch.full((3, 3), 5.0)
    assert torch.allclose(aligned(one, one), torch.ones(3, 3))
    assert torch.allclose(aligned(one, -one), -torch.ones(3, 3))
    # A single shared entry of 2 × 2: its product is 4, and each of the four is averaged over all four.
    spike = torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    assert torch.allclose(aligned(spike, spike), torch.ones(2, 2))


def test_without_alignment_size_and_general_text_it_is_fisher_times_size():
    for scales in ("standard", "published"):
        given = seen()
        method = GaPrune(against=0.0, size=0.0, alignment=0.0, scales=scales)
        assert torch.equal(ranks(score(method, *given)), ranks((given[3] + SMALLEST) * given[0].abs()))


def test_where_both_texts_say_the_same_it_is_magnitude():
    given = seen()
    given[4] = given[3]
    for scales in ("standard", "published"):
        assert torch.equal(ranks(score(GaPrune(scales=scales), *given)), ranks(given[0].abs()))


def test_more_alignment_raises_what_the_domain_needs():
    given = seen()
    fisher = (given[3] - given[4]) > 0
    method = GaPrune(scales="published", size=0.0)
    agreeing, opposed = (score(method, given[0], given[1], sign * given[1], *given[3:]) for sign in (1, -1))
    assert (agreeing[fisher] > opposed[fisher]).all()


def test_the_lowest_of_all_matrices_go():
    model = lettered()
    model.module.model.layers[0].mlp.up_proj.weight.data *= 1e-3
    method = GaPrune(sparsity=0.3, where="mlp", scales="published", size=100.0)  # size rules, and is the same in all matrices
    mw.apply(model, method, data=texts.read(TEXT), samples=4, length=16)
    weights = dict(blocks_of(model, "mlp.gate", "mlp.up", "mlp.down"))
    assert sum(int((weight == 0).sum()) for weight in weights.values()) == int(0.3 * sum(map(torch.numel, weights.values())))
    assert (weights["model.layers.0.mlp.up_proj.weight"] == 0).all()
    assert all((weight != 0).all() for name, weight in blocks_of(model) if "attn" in name)
    assert "of the deviation of scores" in model.history[-1]["notes"][0]


def test_each_matrix_may_lose_its_own_share():
    model, by_size = lettered("gpt2"), lettered("gpt2")
    settings = {"scope": "tensor", "general": "corpus", "alignment": 0.0, "against": 0.0, "size": 1e9, "scales": "published"}
    mw.apply(model, GaPrune(**settings, pattern="2:4"), data=texts.read(TEXT), samples=2, length=16)
    mw.apply(by_size, Magnitude(pattern="2:4"))
    for (name, one), (_, other) in zip(blocks_of(model), blocks_of(by_size), strict=True):
        assert torch.equal(one, other), name


def test_shares_by_place_need_matrices_that_do_not_compete():
    with pytest.raises(SettingError, match="sparsity differs by place, but all weights compete. Use scope: tensor"):
        GaPrune(sparsity={"mlp": 0.5})
    GaPrune(sparsity={"mlp": 0.5}, scope="tensor")


def test_both_terms_have_a_deviation_of_1_in_their_tensor_before_size_counts():
    fisher, size = GaPrune(size=0.3).terms(*seen())
    assert fisher.std(correction=0).item() == pytest.approx(1, rel=1e-5)
    assert size.std(correction=0).item() == pytest.approx(0.3, rel=1e-5)


def test_alignment_moves_the_fisher_term_by_a_fifth_at_most():
    weight, one, _, *squares = seen()
    plain = GaPrune(scales="published", alignment=0.0).terms(weight, one, one, *squares)[0]
    for sign, factor in ((1, 1.2), (-1, 0.8)):
        far = GaPrune(scales="published", alignment=1e6).terms(weight, one, sign * one, *squares)[0]
        assert torch.allclose(far, factor * plain, rtol=1e-5)


def test_the_domain_is_the_data_and_general_text_the_other():
    model = lettered()
    sites = [site for site in model.sites() if site.role == "mlp.up"]
    texts_ = [[{"input_ids": torch.randint(1, 90, (2, 12), generator=torch.Generator().manual_seed(seed))}] for seed in (0, 1)]
    method = GaPrune(against=0.0, size=0.0, alignment=0.0, scales="published")
    found = method.scores(model, sites, texts_, [])
    for site, score_ in zip(sites, found, strict=True):
        weight = model.module.get_parameter(site.name).detach()
        fisher = gradient_moments(model, texts_[0])[1][site.name]
        assert torch.allclose(score_, (fisher + SMALLEST) * weight.abs(), rtol=1e-4)

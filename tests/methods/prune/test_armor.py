import pytest
import torch
from calibration import correlated, gathered, normal

from modelwright.blocks.armor import ArmorLinear
from modelwright.core.errors import SiteError
from modelwright.maths.masks import lowest
from modelwright.maths.wrapped import exchange, gradients, loss, wrapped
from modelwright.methods.prune.armor import Armor


def rng():
    return torch.Generator().manual_seed(0)


def start(rows=16, columns=24, size=8):
    weight, h = normal(rows, columns), torch.rand(columns, generator=rng()) + 0.1
    noise = [0.1 * normal(side // size, size, size, seed=side) for side in (rows, columns)]
    left, right = (torch.eye(size) + each for each in noise)
    core = weight.masked_fill(lowest(weight.square() * h, pattern=(2, 4)), 0)
    return left, core, right, weight, h


def dense(left, core, right):
    return torch.block_diag(*left) @ core @ torch.block_diag(*right)


def test_the_loss_and_its_gradients_are_those_of_the_dense_product():
    left, core, right, weight, h = start()
    parts = [part.clone().requires_grad_() for part in (left, core, right)]
    expected = (h * (dense(*parts) - weight).square()).sum()
    assert torch.allclose(loss(left, core, right, weight, h), expected / (h * weight.square()).sum())
    for ours, theirs in zip(gradients(left, core, right, weight, h), torch.autograd.grad(expected / 2, parts), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-4)


def test_exchanges_never_raise_the_loss_and_keep_the_pattern():
    left, core, right, weight, h = start()
    generator, before = rng(), loss(*start())
    for _ in range(60):
        core = exchange(left, core, right, weight, h, generator)
        now = loss(left, core, right, weight, h)
        assert now <= before * (1 + 1e-5)
        assert ((core == 0).view(16, 6, 4).sum(-1) >= 2).all()
        before = now
    assert before < 0.9 * loss(*start())


def test_an_exchange_finds_the_best_pair_and_its_values():
    left, core, right, weight, h = start(8, 8)
    after = exchange(left, core, right, weight, h, rng())
    row, run = ((core != after).view(8, 2, 4).any(-1)).nonzero()[0].tolist()
    best = torch.inf
    for pair in ((0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)):
        trial = core.clone()
        trial[row, 4 * run : 4 * run + 4] = 0
        rest = ((dense(left, trial, right) - weight) * h.sqrt()).flatten().double()
        columns = []
        for place in pair:
            one = torch.zeros_like(core)
            one[row, 4 * run + place] = 1
            columns.append((dense(left, one, right) * h.sqrt()).flatten().double())
        basis = torch.stack(columns, 1)
        values = torch.linalg.lstsq(basis, -rest[:, None]).solution
        best = min(best, float((rest[:, None] + basis @ values).square().sum()))
    found = float((h * (dense(left, after, right) - weight).square()).sum())
    assert found == pytest.approx(best, rel=1e-4)


def test_without_steps_it_is_the_largest_of_the_normalised_weights():
    weight, h = normal(16, 24), torch.rand(24, generator=rng()) + 0.1
    left, core, right = wrapped(weight, h, 8, rng(), steps=0)
    by_column = weight.norm(dim=0)
    normalised = weight / by_column
    normalised = normalised / normalised.norm(dim=1, keepdim=True)
    expected = weight.masked_fill(lowest(normalised.square() * h, pattern=(2, 4)), 0)
    assert torch.allclose(dense(left, core, right), expected, atol=1e-5)


def test_steps_lower_the_loss_and_the_layer_computes_its_dense_weight():
    weight, statistics = normal(16, 24), gathered(correlated(100, 24), "square")
    h = statistics.square
    none, some = (Armor(width=8, iterations=steps, rate=0.01).layer(weight, statistics, rng()) for steps in (0, 200))
    assert isinstance(some, ArmorLinear)
    assert (h * (some.dense() - weight).square()).sum() < 0.7 * (h * (none.dense() - weight).square()).sum()
    assert ((some.core.dense() == 0).view(16, 6, 4).sum(-1) == 2).all()
    inputs = normal(5, 3, 24)
    assert torch.allclose(some(inputs), inputs @ some.dense().T, atol=1e-5)
    assert some.stored_bytes() == Armor(width=8).planned(weight.to("meta")).stored_bytes()


def test_widths_that_do_not_divide_are_refused():
    assert Armor(width=8).unfit((16, 24)) == ""
    assert "is 16 × 20; the width must be a multiple of 4 that divides both, and is 8" in Armor(width=8).unfit((16, 20))


def test_a_run_is_drawn_by_the_size_of_its_gradient():
    left, core, right, weight, h = start(8, 8)
    chances = gradients(left, core, right, weight, h)[1].abs().view(8, 2, 4).sum(-1)
    chances = chances / chances.sum()
    seen = torch.zeros(8, 2)
    for seed in range(3000):
        after = exchange(left, core, right, weight, h, torch.Generator().manual_seed(seed))
        seen += (core != after).view(8, 2, 4).any(-1)
    assert torch.allclose(seen / 3000, chances, atol=0.02)
    assert (seen / 3000 - 1 / 16).abs().max() > 0.04


def test_what_stays_is_chosen_anew_on_the_way():
    weight, h = normal(16, 24), torch.rand(24, generator=rng()) + 0.1
    none, some = (wrapped(weight, h, 8, rng(), steps=steps, rate=0.01) for steps in (0, 40))
    assert not torch.equal(none[1] != 0, some[1] != 0)
    assert ((some[1] == 0).view(16, 6, 4).sum(-1) == 2).all()


def test_rows_and_columns_of_zeros_stay_so():
    weight = normal(16, 24)
    weight[3], weight[:, 7] = 0, 0
    for steps in (0, 5):
        found = dense(*wrapped(weight, torch.ones(24), 8, rng(), steps=steps))
        assert found.isfinite().all()
        assert (found[3] == 0).all()
        assert (found[:, 7] == 0).all()


def test_weights_that_are_not_finite_are_refused():
    weight = normal(16, 24)
    weight[2, 5] = torch.nan
    with pytest.raises(SiteError, match=r"prune\.armor: a weight holds NaN or infinity"):
        Armor(width=8).layer(weight, gathered(correlated(100, 24), "square"), rng())


def test_the_sizes_of_rows_and_columns_go_into_the_outer_matrices_when_these_are_no_identities():
    weight = normal(16, 24) * torch.logspace(-2, 2, 24) * torch.logspace(1, -1, 16)[:, None]
    by_column = weight.norm(dim=0)
    by_row = (weight / by_column).norm(dim=1)

    def missed(parts):
        return float(((dense(*parts) - weight) / by_column / by_row[:, None]).square().sum())

    none, some = (wrapped(weight, torch.ones(24), 8, rng(), steps=steps, rate=0.01) for steps in (0, 200))
    blocks = some[2] / by_column.view(-1, 1, 8)
    assert not torch.allclose(blocks, torch.eye(8).expand_as(blocks), atol=1e-2)
    assert missed(some) < 0.8 * missed(none)


def test_stored_dense_it_is_the_product():
    weight, statistics = normal(16, 24), gathered(correlated(100, 24), "square")
    packed, plain = (Armor(width=8, iterations=5, store=store).layer(weight, statistics, rng()) for store in ("armor", "dense"))
    assert torch.equal(plain, packed.dense())
    assert torch.equal(Armor(width=8, store="dense").planned(weight), weight)

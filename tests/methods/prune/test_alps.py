import pytest
import torch
from calibration import correlated, cost, damped, gathered, normal

from modelwright.maths.alternating import alternate, on_support
from modelwright.maths.masks import lowest
from modelwright.methods.prune.alps import Alps
from modelwright.methods.prune.sparsegpt import SparseGpt

WEIGHT = normal(24, 64)


def seen(seed=1):
    return gathered(correlated(300, 64, seed=seed))


def test_a_case_by_hand():
    # Inputs (√2, √2), (√2, 0): H = [[2, 1], [1, 1]]. Of [3, 9] the 3 goes, and 9 + 3 · 1/1 = 12 makes up for it.
    statistics = gathered(torch.tensor([[2.0, 2.0], [2.0, 0.0]]).sqrt())
    assert torch.allclose(Alps(sparsity=0.5, damp=0).layer(torch.tensor([[3.0, 9.0]]), statistics), torch.tensor([[0.0, 12.0]]), atol=1e-4)


def test_one_step_by_hand():
    # C = [[1, 0.6], [0.6, 1]], B = (4, 5), D = (0, 5), V = 0, ρ = 0.2: (C + ρ)⁻¹ (C B + ρ D), with C B = (7, 7.4).
    # (1.2 · 7 - 0.6 · 8.4) / (1.44 - 0.36) = 3.36 / 1.08 and (1.2 · 8.4 - 0.6 · 7) / 1.08 = 5.88 / 1.08.
    moment, weight = torch.tensor([[1.0, 0.6], [0.6, 1.0]]), torch.tensor([[4.0], [5.0]])
    found = alternate(moment, weight, lambda b: b.abs() == b.abs().max(), penalty=0.2, steps=1)
    assert found.flatten().tolist() == pytest.approx([3.36 / 1.08, 5.88 / 1.08], rel=1e-5)


@pytest.mark.parametrize("sparsity", [0.7, 0.8, 0.9])
@pytest.mark.parametrize("seed", range(4))
def test_it_loses_no_more_than_sparsegpt(sparsity, seed):
    weight, statistics = normal(24, 64, seed=seed), seen(seed + 1)
    full = damped(statistics.moment)
    ours, theirs = (method(sparsity=sparsity).layer(weight, statistics) for method in (Alps, SparseGpt))
    assert cost(weight, ours, full) <= cost(weight, theirs, full)


def test_inputs_that_are_always_0_need_no_damping():
    inputs = correlated(300, 64)
    inputs[:, 5] = 0
    result = Alps(sparsity=0.5, damp=0).layer(WEIGHT, gathered(inputs))
    assert result.isfinite().all()
    assert int((result == 0).sum()) == WEIGHT.numel() // 2


def test_a_pattern_loses_no_more_than_sparsegpts():
    for seed in range(4):
        weight, statistics = normal(24, 64, seed=seed), seen(seed + 1)
        full = damped(statistics.moment)
        ours, theirs = (method(pattern="2:4").layer(weight, statistics) for method in (Alps, SparseGpt))
        assert ((ours == 0).view(24, 16, 4).sum(-1) == 2).all()
        assert cost(weight, ours, full) <= cost(weight, theirs, full)


@pytest.mark.parametrize("sparsity", [0.1, 0.33, 0.5, 0.7, 0.95])
def test_exactly_the_asked_number_goes(sparsity):
    result = Alps(sparsity=sparsity).layer(WEIGHT, seen())
    assert int((result == 0).sum()) == int(sparsity * WEIGHT.numel())


def test_on_the_support_the_gradient_is_0():
    statistics = seen()
    full = damped(statistics.moment).float()
    result = Alps(sparsity=0.7, refits=200).layer(WEIGHT, statistics)
    gradient = (result - WEIGHT) @ full
    assert gradient[result != 0].abs().max() < 1e-3 * (WEIGHT @ full).abs().max()
    best = torch.zeros_like(WEIGHT)
    for row in range(24):
        keep = result[row] != 0
        best[row, keep] = torch.linalg.solve(full[keep][:, keep], full[keep] @ WEIGHT[row])
    assert torch.allclose(result, best, atol=1e-2)


def test_refits_lower_the_loss():
    statistics = seen()
    full = damped(statistics.moment)
    losses = [cost(WEIGHT, Alps(sparsity=0.7, iterations=6, refits=refits).layer(WEIGHT, statistics), full) for refits in (0, 2, 10, 50)]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.99 * losses[0]


def test_with_inputs_that_do_not_depend_on_each_other_what_stays_is_as_it_was_and_near_the_best():
    sizes = torch.linspace(0.5, 2, 64)
    statistics = gathered(torch.diag(sizes) * 8)
    result = Alps(sparsity=0.5).layer(WEIGHT, statistics)
    assert torch.allclose(result, WEIGHT.masked_fill(result == 0, 0), atol=1e-5)
    full = damped(statistics.moment)
    best = WEIGHT.masked_fill(lowest((WEIGHT * full.diagonal().sqrt()).abs(), 0.5), 0)
    assert cost(WEIGHT, best, full) <= cost(WEIGHT, result, full) <= 1.02 * cost(WEIGHT, best, full)


def test_conjugate_gradients_solve_each_column():
    moment, wanted = gathered(correlated(50, 6)).moment.double(), normal(6, 3).double()
    every = torch.ones(6, 3, dtype=torch.bool)
    assert torch.allclose(on_support(moment, wanted, torch.zeros_like(wanted), every, steps=30), wanted, atol=1e-6)
    held = torch.tensor([[True, False, True]] * 3 + [[False, False, True]] * 3)
    found = on_support(moment, wanted, torch.zeros_like(wanted), held, steps=30)
    assert (found[~held] == 0).all()
    first = torch.linalg.solve(moment[:3, :3], (moment @ wanted)[:3, 0])
    assert torch.allclose(found[:3, 0], first, atol=1e-6)


def test_a_support_of_all_gives_the_weight_back():
    moment = torch.eye(8)
    assert torch.allclose(alternate(moment, normal(8, 4), lambda b: torch.ones_like(b, dtype=torch.bool)), normal(8, 4), atol=1e-5)


def test_columns_that_no_input_reaches_and_few_tokens_are_no_trouble():
    inputs = correlated(300, 64)
    inputs[:, [3, 40]] = 0
    for statistics in (gathered(inputs), gathered(correlated(5, 64))):
        result = Alps(sparsity=0.5).layer(WEIGHT, statistics)
        assert result.isfinite().all()
        assert int((result == 0).sum()) == WEIGHT.numel() // 2


def published(moment, weight, count, penalty, steps):
    """The card's loop, with equations solved anew at every step."""

    def sparse(b):
        return b.flatten().scatter(0, b.abs().flatten().argsort()[: b.numel() - count], 0).view_as(b)

    start = sparse(weight)
    b, d, dual, kept, grown = weight, start, torch.zeros_like(weight), start != 0, False
    for step in range(1, steps + 1):
        b = torch.linalg.solve(moment + penalty * torch.eye(len(moment)).double(), moment @ weight - dual + penalty * d)
        d = sparse(b + dual / penalty)
        dual = dual + penalty * (b - d)
        if step % 3 == 0:
            changed, kept = int(((d != 0) & ~kept).sum()) / count, d != 0
            if changed > 0.1:
                penalty, grown = penalty * 1.3, True
            elif changed > 0.005:
                penalty, grown = penalty * 1.2, True
            elif changed and grown:
                penalty *= 1.1
            elif changed:
                penalty, b, d, dual, kept = penalty / 5, weight, start, torch.zeros_like(weight), start != 0
            elif grown:
                break
            else:
                penalty /= 5
    return b


@pytest.mark.parametrize("steps", [3, 12, 27])
@pytest.mark.parametrize("penalty", [0.1, 0.5, 20.0])
def test_it_is_the_published_loop(steps, penalty):
    moment = damped(gathered(correlated(100, 24)).moment)
    scale = moment.diagonal().sqrt()
    moment, weight, count = moment / (scale[:, None] * scale), normal(24, 12).double(), 87
    found = alternate(
        moment, weight.float(), lambda b: ~lowest(b.abs()[None].flatten(1), 1 - count / 288 + 1e-9).view_as(b), penalty=penalty, steps=steps
    )
    assert torch.allclose(found.double(), published(moment, weight, count, penalty, steps), atol=2e-3)


def test_the_support_is_that_of_the_loop_with_its_penalty():
    statistics = seen()
    full = damped(statistics.moment).float()
    scale = full.diagonal().sqrt()
    method = Alps(sparsity=0.7, penalty=0.3, iterations=9)
    found = alternate(full / (scale[:, None] * scale), WEIGHT.T * scale[:, None], method.kept, penalty=0.3, steps=9)
    result = method.layer(WEIGHT, statistics)
    assert ((result != 0) == method.kept(found).T).float().mean() > 0.999
    other = Alps(sparsity=0.7, penalty=30.0, iterations=9).layer(WEIGHT, statistics)
    assert ((result != 0) == (other != 0)).float().mean() < 0.99

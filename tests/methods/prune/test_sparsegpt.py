import pytest
import torch
from calibration import batches, correlated, cost, damped, gathered, normal, with_moment
from tiny import outputs, tiny

import modelwright as mw
from modelwright.core.errors import SettingError, SiteError
from modelwright.methods.prune.sparsegpt import SparseGpt

WEIGHT = normal(24, 64)
SEEN = gathered(correlated(300, 64))


def published(weight, moment, sparsity, size=128, damp=0.01):
    """Algorithm 1 as printed: (result, Σ (w - q)² / U_jj²), in float64."""
    weight, moment = weight.double().clone(), damped(moment, damp)
    upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(moment)), upper=True)
    columns = weight.shape[1]
    loss = 0.0
    for start in range(0, columns, size):
        stop = min(start + size, columns)
        score = weight[:, start:stop] ** 2 / upper.diagonal()[start:stop] ** 2
        gone = torch.zeros(score.numel(), dtype=torch.bool)
        gone[score.flatten().argsort()[: int(sparsity * score.numel())]] = True
        gone = gone.view(score.shape)
        for j in range(start, stop):
            error = torch.where(gone[:, j - start], weight[:, j], 0.0) / upper[j, j]
            loss += error.square().sum().item()
            weight[:, j:] -= error[:, None] * upper[j, j:]
            weight[gone[:, j - start], j] = 0
    return weight, loss


def test_a_case_by_hand():
    # Inputs (√2, √2), (√2, 0): H = [[2, 1], [1, 1]], H⁻¹ = [[1, -1], [-1, 2]] = UᵀU with U = [[1, -1], [0, 1]].
    # Scores w²/U_jj²: 9 and 25, so of [3, 5] the 3 goes; e = 3/1, and [3, 5] - 3·[1, -1] = [0, 8].
    statistics = gathered(torch.tensor([[2.0, 2.0], [2.0, 0.0]]).sqrt())
    result = SparseGpt(sparsity=0.5, damp=0).layer(torch.tensor([[3.0, 5.0]]), statistics)
    assert torch.allclose(result, torch.tensor([[0.0, 8.0]]), atol=1e-5)
    # With 1/(H⁻¹)_jj in place of 1/U_jj² the scores would be 9 and 12.5; of [3, 4] they would be 9 and 8, and the 4 would go.
    result = SparseGpt(sparsity=0.5, damp=0).layer(torch.tensor([[3.0, 4.0]]), statistics)
    assert torch.allclose(result, torch.tensor([[0.0, 7.0]]), atol=1e-5)


@pytest.mark.parametrize("size", [16, 48, 128])
@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.8])
def test_it_is_the_published_algorithm(sparsity, size):
    expected, loss = published(WEIGHT, SEEN.moment, sparsity, size)
    result = SparseGpt(sparsity=sparsity, columns=size).layer(WEIGHT, SEEN)
    assert torch.equal(result == 0, expected == 0)
    assert torch.allclose(result.double(), expected, atol=1e-3)
    assert loss == pytest.approx(cost(WEIGHT, expected, damped(SEEN.moment)), rel=1e-9)  # exactly what the outputs lose
    assert loss == pytest.approx(cost(WEIGHT, result, damped(SEEN.moment)), rel=1e-3)


def test_blocks_change_nothing_when_the_mask_does_not_depend_on_them():
    results = [SparseGpt(pattern="2:4", columns=size).layer(WEIGHT, SEEN) for size in (4, 20, 32, 64, 1000)]
    for result in results[1:]:
        assert torch.equal(result == 0, results[0] == 0)
        assert torch.allclose(result, results[0], atol=1e-4)


def test_removing_the_first_column_alone_is_the_exact_least_squares():
    weight = normal(24, 64)
    weight = weight.sign() * (weight.abs() + 0.5)
    inputs = normal(300, 64, seed=1)
    inputs[:, 0] = inputs[:, 1:5].sum(1)  # the others can do its work, so the 24 lowest scores of 24 · 64 are its own
    statistics = gathered(inputs)
    result = SparseGpt(sparsity=1 / 64, damp=1e-3).layer(weight, statistics)
    assert torch.equal(result == 0, (torch.arange(64) == 0).expand(24, 64))
    full = damped(statistics.moment, 1e-3)
    expected = torch.linalg.solve(full[1:, 1:], full[1:] @ weight.double().T).T
    assert torch.allclose(result[:, 1:].double(), expected, atol=1e-4)
    assert (result[:, 1] - weight[:, 1]).abs().min() > 0.3


@pytest.mark.parametrize("settings", [{"sparsity": 0.5}, {"sparsity": 0.8}, {"pattern": "2:4"}])
def test_it_loses_less_than_its_mask_and_no_less_than_the_least_squares_for_it(settings):
    result = SparseGpt(**settings).layer(WEIGHT, SEEN)
    full = damped(SEEN.moment)
    best = torch.zeros_like(WEIGHT)
    for row in range(len(WEIGHT)):
        keep = result[row] != 0
        best[row, keep] = torch.linalg.solve(full[keep][:, keep], full[keep] @ WEIGHT[row].double()).float()
    mask_only = WEIGHT.masked_fill(result == 0, 0)
    assert cost(WEIGHT, best, full) <= cost(WEIGHT, result, full) <= 0.9 * cost(WEIGHT, mask_only, full)


def test_each_block_of_columns_has_its_share_of_zeros():
    weight = WEIGHT * torch.logspace(-2, 2, 64)
    result = SparseGpt(sparsity=0.5, columns=16).layer(weight, SEEN)
    assert (result == 0).view(24, 4, 16).sum((0, 2)).tolist() == [24 * 8] * 4


def test_the_scale_of_the_inputs_does_not_matter():
    one = SparseGpt(sparsity=0.5).layer(WEIGHT, SEEN)
    other = SparseGpt(sparsity=0.5).layer(WEIGHT, gathered(64 * correlated(300, 64)))
    assert torch.allclose(one, other, atol=1e-4)


def test_columns_that_no_input_reaches_are_zeroed():
    inputs = correlated(300, 64)
    inputs[:, [3, 40]] = 0
    result = SparseGpt(sparsity=0.1).layer(WEIGHT, gathered(inputs))
    assert (result[:, [3, 40]] == 0).all()
    assert result.isfinite().all()


@pytest.mark.parametrize("damp", [0.0, 0.01])
def test_fewer_tokens_than_inputs_are_enough(damp):
    result = SparseGpt(sparsity=0.5, damp=damp).layer(WEIGHT, gathered(correlated(5, 64)))
    assert result.isfinite().all()
    assert (result == 0).sum() == WEIGHT.numel() // 2


def test_a_moment_that_cannot_be_used_is_refused_with_advice():
    indefinite = torch.tensor([[1.0, 1e9], [1e9, 1.0]])
    with pytest.raises(SiteError, match=r"has no inverse.*Give more calibration text, or leave the layer out with `skip`"):
        SparseGpt().layer(torch.ones(1, 2), with_moment(indefinite))
    with pytest.raises(SiteError, match=r"not finite.*wider dtype"):
        SparseGpt().layer(torch.ones(1, 2), with_moment(torch.full((2, 2), torch.inf)))


def test_runs_that_blocks_would_cut_are_refused():
    with pytest.raises(SettingError, match=r"prune.sparsegpt: blocks of 30 columns cut .* multiple of 4"):
        SparseGpt(pattern="2:4", columns=30)
    with pytest.raises(SettingError, match=r"pattern 2:3 .* 2, 4, 8, 16 or 32"):
        SparseGpt(pattern="2:3")


@pytest.mark.parametrize("settings", [{"sparsity": 0.3, "columns": 20}, {"pattern": "1:4"}])
def test_the_sparse_form_takes_the_bytes_that_were_planned(settings):
    method = SparseGpt(**settings, store="sparse")
    layer = method.layer(WEIGHT, SEEN)
    assert torch.equal(layer.dense(), SparseGpt(**settings).layer(WEIGHT, SEEN))
    assert layer.stored_bytes() == method.planned(WEIGHT.to("meta")).stored_bytes()


def test_experts_with_few_tokens_are_pruned_too():
    model = tiny("qwen3_moe")
    mw.apply(model, SparseGpt(sparsity=0.5), data=[{"input_ids": torch.tensor([[5, 9, 11]])}])
    assert outputs(model).isfinite().all()
    stack = model.model.layers[2].mlp.experts.down_proj
    assert ((stack == 0).sum((1, 2)) == stack[0].numel() // 2).all()


def test_a_model_keeps_more_of_its_outputs_than_by_its_masks_alone():
    before, after, masked = tiny(), tiny(), tiny()
    mw.apply(after, SparseGpt(sparsity=0.5), data=batches(before, 8))
    with torch.no_grad():
        for weight, other in zip(masked.parameters(), after.parameters(), strict=True):
            weight.masked_fill_(other == 0, 0)
    expected = outputs(before)
    assert (outputs(after) - expected).norm() < (outputs(masked) - expected).norm()

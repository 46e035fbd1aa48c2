import pytest
import torch

from modelwright.maths.allocation import keep_by_harm, keep_highest, keep_highest_of_all, standardised


def test_a_share_of_the_lowest_goes_and_of_equals_the_first():
    score = torch.tensor([3.0, 1.0, 2.0, 1.0, 5.0])
    assert keep_highest(score, 0.2) == [0, 2, 3, 4]
    assert keep_highest(score, 0.5) == [0, 2, 4]
    assert keep_highest(score, 0.0) == [0, 1, 2, 3, 4]
    assert keep_highest(score, 1.0) == [4]


def test_units_of_all_groups_compete_by_score_and_count_by_cost():
    cheap, dear = torch.tensor([1.0, 4.0, 5.0, 6.0]), torch.tensor([2.0, 3.0])
    # 10 parameters in all, 4 · 1 + 2 · 3; the order is 1 (1), 2 (3), then 3 stays as the highest of its group, 4 (1), ...
    assert keep_highest_of_all([cheap, dear], [1.0, 3.0], 0.1) == [[1, 2, 3], [0, 1]]
    assert keep_highest_of_all([cheap, dear], [1.0, 3.0], 0.39) == [[3], [0, 1]]  # 2 would be too much, 4 and 5 are not
    assert keep_highest_of_all([cheap, dear], [1.0, 3.0], 0.4) == [[1, 2, 3], [1]]
    assert keep_highest_of_all([cheap, dear], [1.0, 3.0], 0.5) == [[2, 3], [1]]
    assert keep_highest_of_all([cheap, dear], [1.0, 3.0], 1.0) == [[3], [1]]


def test_units_of_infinite_score_stay():
    score = torch.tensor([2.0, float("inf"), 1.0, float("inf")])
    assert keep_highest_of_all([score, torch.tensor([5.0, 6.0])], [1.0, 1.0], 1.0) == [[1, 3], [1]]


def test_standardised_scores_have_mean_0_and_variance_1_and_equal_ones_are_0():
    found = standardised(torch.tensor([[1.0, 2.0], [3.0, 6.0]]))
    assert found.mean().item() == pytest.approx(0, abs=1e-12)
    assert found.std().item() == pytest.approx(1)
    assert standardised(torch.full((4,), 7.0)).tolist() == [0.0] * 4
    assert standardised(torch.tensor([7.0])).tolist() == [0.0]


def test_shares_by_harm_by_hand():
    # Two groups of cost 10, shares that cost 5 and 8. Harm rises: (1, at 8), (0, at 8), (1, at 5), (0, at 5).
    harm = torch.tensor([[9.0, 2.0], [3.0, 1.0]])
    costs = torch.tensor([[5.0, 8.0], [5.0, 8.0]])
    expected = {20: [None, None], 19: [None, 1], 18: [None, 1], 17: [1, 1], 16: [1, 1], 13: [1, 0], 12: [0, 0], 10: [0, 0], 1: [0, 0]}
    for budget, places in expected.items():
        assert keep_by_harm(harm, costs, [10, 10], budget) == places


def test_a_share_that_costs_no_less_is_not_taken():
    assert keep_by_harm(torch.tensor([[1.0, 2.0]]), torch.tensor([[10.0, 4.0]]), [10], 5) == [1]
    assert keep_by_harm(torch.tensor([[2.0, 1.0]]), torch.tensor([[8.0, 4.0]]), [10], 1) == [1]

import pytest
import torch

from modelwright.maths.allocation import (
    erk,
    even,
    keep_by_harm,
    keep_highest,
    keep_highest_of_all,
    least_harm,
    outliers,
    owl,
    owl_counts,
    standardised,
)


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


def test_erk_by_hand():
    # Sizes 8 and 32, (in + out) / (in · out) = 6/8 and 12/32. Half of 40 stays: c · (6 + 12) = 20, so 5/6 and 5/12.
    assert erk([(2, 4), (4, 8)], 0.5) == pytest.approx([5 / 6, 5 / 12])
    # Three quarters, 30: c = 30/18 would keep 1.25 of the first, so all of its 8 stay, and 22 of the other's 32.
    assert erk([(2, 4), (4, 8)], 0.75) == pytest.approx([1, 22 / 32])
    assert erk([(2, 4), (4, 8)], 1.0) == pytest.approx([1, 1])
    assert erk([(2, 4), (4, 8)], 0.0) == [0, 0]


@pytest.mark.parametrize("keep", [0.05, 0.3, 0.5, 0.9, 0.99])
def test_erk_keeps_the_budget_exactly_and_no_more_than_all(keep):
    shapes = [(64, 64), (64, 32), (160, 64), (64, 160), (3, 5), (1, 64)]
    kept = erk(shapes, keep)
    sizes = [rows * columns for rows, columns in shapes]
    assert sum(share * size for share, size in zip(kept, sizes, strict=True)) == pytest.approx(keep * sum(sizes), rel=1e-12)
    assert all(0 <= share <= 1 for share in kept)


def test_outliers_by_hand():
    # The mean of 1 1 1 1 16 is 4; above 3 · 4 lies one of five.
    assert outliers([torch.tensor([1.0, 1.0]), torch.tensor([[1.0, 1.0, 16.0]])], 3.0) == 20.0
    assert outliers([torch.ones(4)], 1.0) == 0.0


def test_owl_by_hand():
    # D of 0, 2 and 4 with spread 0.1: 0, 0.1 and 0.2 before their mean of 0.1 is moved to 0.5.
    assert owl([0.0, 2.0, 4.0], [10, 10, 10], 0.5, 0.1) == pytest.approx([0.4, 0.5, 0.6])
    # A block of 30 weighs three times: the mean is (0 + 0.1 + 3 · 0.2) / 5 = 0.14.
    assert owl([0.0, 2.0, 4.0], [10, 10, 30], 0.5, 0.1) == pytest.approx([0.36, 0.46, 0.56])
    # At 0.95 the last would keep 1.05. It keeps 1, and the others what is left of 2.85: 0.875 and 0.975.
    assert owl([0.0, 2.0, 4.0], [10, 10, 10], 0.95, 0.1) == pytest.approx([0.875, 0.975, 1.0])


@pytest.mark.parametrize("keep", [0.02, 0.3, 0.5, 0.97])
@pytest.mark.parametrize("sizes", [[1] * 8, [5, 1, 1, 9, 2, 2, 3, 1]])
def test_owl_keeps_the_mean_exactly_and_stays_within_its_reach(keep, sizes):
    found = (torch.rand(8, generator=torch.Generator().manual_seed(1)) ** 4).tolist()
    kept = owl(found, sizes, keep, 0.08)
    assert sum(share * size for share, size in zip(kept, sizes, strict=True)) / sum(sizes) == pytest.approx(keep, rel=1e-9)
    assert all(max(keep - 0.16, 0) - 1e-9 <= share <= min(keep + 0.16, 1) + 1e-9 for share in kept)
    assert [found.index(value) for value in sorted(found)] == sorted(range(8), key=lambda place: (kept[place], found[place]))


def test_owl_without_spread_or_with_blocks_alike_is_uniform():
    assert owl([1.0, 5.0, 2.0], [1, 1, 1], 0.3, 0.0) == pytest.approx([0.3] * 3)
    assert owl([2.0, 2.0, 2.0], [1, 1, 1], 0.3, 0.08) == pytest.approx([0.3] * 3)


def test_owl_in_whole_numbers_by_hand():
    # A range of four of eight about 5: 3, 4, 5, 6, 7 by D of 0, 1, 2, 3, 4.
    assert owl_counts([0.0, 1.0, 2.0, 3.0, 4.0], [1] * 5, (5, 8), 0.25) == [3, 4, 5, 6, 7]
    # The authors' range of two of eight: 4, 4.4, 5.6, 6 are 4, 4, 5, 6, and one more to the third, which lost most.
    assert owl_counts([0.0, 1.0, 4.0, 5.0], [1] * 4, (5, 8), 0.125) == [4, 4, 6, 6]
    # The first weighs three times: c + (3 · 0 + 2) / 4 = 2 gives 1.5 and 3.5. One more for it would be 9 of 8, for the other 7.
    assert owl_counts([0.0, 1.0], [3, 1], (2, 4), 0.25) == [1, 4]
    # Never none and never more than all: 0 and 4 of 4 about 2 would be 0 and 4.
    assert owl_counts([0.0, 1.0], [1, 1], (2, 4), 0.5) == [1, 3]
    assert owl_counts([0.0, 1.0], [1, 1], (4, 4), 0.5) == [4, 4]


@pytest.mark.parametrize("pattern", [(1, 4), (2, 4), (5, 8), (7, 8), (8, 16)])
@pytest.mark.parametrize("sizes", [[1] * 8, [5, 1, 1, 9, 2, 2, 3, 1]])
def test_owl_in_whole_numbers_has_the_patterns_mean(pattern, sizes):
    keep, of = pattern
    found = (torch.rand(8, generator=torch.Generator().manual_seed(1)) ** 4).tolist()
    counts = owl_counts(found, sizes, pattern, 0.2)
    kept = sum(count * size for count, size in zip(counts, sizes, strict=True))
    assert keep * sum(sizes) - max(sizes) < kept <= keep * sum(sizes)
    if max(sizes) == 1:
        assert kept == keep * 8
        assert [counts[place] for place in sorted(range(8), key=found.__getitem__)] == sorted(counts)
    assert all(1 <= count <= of and abs(count - keep) < 0.4 * of + 1 for count in counts)
    assert owl_counts(found, sizes, pattern, 0.0) == [keep] * 8
    assert owl_counts([3.0] * 8, sizes, pattern, 0.2) == [keep] * 8


def test_evenly_each_keeps_as_many_and_the_small_are_whole():
    # Of 10 + 100 + 1000, 30%: 333; the first is whole, then 323 for two, of which the second has only 100: 223 for the third.
    assert even([1000, 10, 100], 0.3) == pytest.approx([0.223, 1, 1])
    assert even([1000, 10, 100], 0.1) == pytest.approx([0.0505, 1, 0.505])  # 111: 10 and 50.5 twice
    assert even([5, 5], 1.0) == [1, 1]
    assert even([5, 20], 0.2) == pytest.approx([0.5, 0.125])


@pytest.mark.parametrize("keep", [0.01, 0.2, 0.5, 0.93, 1.0])
def test_evenly_meets_the_budget_and_is_the_best_logarithm(keep):
    sizes = [17, 400, 30, 2500, 2500, 64, 9]
    dense = even(sizes, keep)
    assert sum(share * size for share, size in zip(dense, sizes, strict=True)) == pytest.approx(keep * sum(sizes), rel=1e-6)
    # Karush, Kuhn, Tucker: 1 / p = λ · size where p < 1, and at most that where p = 1.
    level = [share * size for share, size in zip(dense, sizes, strict=True) if share < 1]
    assert not level or max(level) == pytest.approx(min(level))
    assert all(share < 1 or size <= max(level, default=size) * (1 + 1e-12) for share, size in zip(dense, sizes, strict=True))
    # Any other division of the budget has a smaller sum of logarithms.
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        other = torch.tensor(dense, dtype=torch.float64) * torch.rand(7, generator=generator, dtype=torch.float64)
        other = other * keep * sum(sizes) / (other @ torch.tensor(sizes, dtype=torch.float64))
        if other.max() <= 1:
            assert other.log().sum() <= torch.tensor(dense, dtype=torch.float64).log().sum() + 1e-9


def test_options_with_the_least_harm_by_hand():
    # At a price of 0.2 to 3 the first takes its second option (harm falls by 3 for 1, then by 0.2), the other stays or follows at 1.
    harm, costs = torch.tensor([[4.0, 1.0, 0.8], [2.0, 1.0, 0.0]]), torch.tensor([[1.0, 2.0, 3.0], [1.0, 2.0, 3.0]])
    assert [least_harm(harm, costs, budget) for budget in (2, 3, 4, 5, 6)] == [[0, 0], [1, 0], [1, 1], [1, 2], [2, 2]]
    with pytest.raises(ValueError, match="cheapest options cost 2, above the budget of 1"):
        least_harm(harm, costs, 1)


@pytest.mark.parametrize("seed", range(20))
def test_options_of_convex_harm_are_nearly_the_best_of_all(seed):
    generator = torch.Generator().manual_seed(seed)
    slopes = torch.rand(6, 3, generator=generator).sort(1, descending=True).values
    sizes = torch.randint(1, 5, (6, 1), generator=generator).double()
    costs = sizes * torch.tensor([2.0, 3.0, 4.0, 5.0])
    harm = 10 - torch.cat([torch.zeros(6, 1), (slopes * sizes).cumsum(1)], 1)
    budget = float(sizes.sum() * 3.4)
    chosen = torch.tensor(least_harm(harm, costs, budget))
    items = torch.arange(6)
    assert costs[items, chosen].sum() <= budget
    every = torch.cartesian_prod(*[torch.arange(4)] * 6)
    spent = sum(costs[item, every[:, item]] for item in range(6))
    lost = sum(harm[item, every[:, item]] for item in range(6))
    best = float(lost[spent <= budget].min())
    assert float(harm[items, chosen].sum()) <= best + float((slopes * sizes).max())
    assert float(harm[items, chosen].sum()) < float(harm[:, 1].sum())


def test_an_option_whose_harm_is_not_a_number_is_not_taken():
    nan = float("nan")
    assert least_harm(torch.tensor([[nan, 1, 0.1], [1, 0.5, 0.1]]), torch.tensor([[2.0, 4, 8], [2, 4, 8]]), 12) in ([1, 2], [2, 1])

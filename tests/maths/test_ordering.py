import itertools

import pytest
import torch

from modelwright.core.errors import SiteError
from modelwright.maths.masks import lowest
from modelwright.maths.ordering import assigned, best_order, dealt


def test_dealing_by_hand():
    # Sorted 9 8 7 6 5 4 3 2 in two strips of four; the second is turned: runs 9 2, 8 3, 7 4, 6 5.
    strength = torch.tensor([2.0, 9.0, 4.0, 7.0, 5.0, 3.0, 8.0, 6.0])
    assert strength[dealt(strength, 2)].tolist() == [9, 2, 8, 3, 7, 4, 6, 5]
    assert strength[dealt(strength, 4)].tolist() == [9, 6, 5, 2, 8, 7, 4, 3]


def kept(score, pattern):
    return score.masked_fill(lowest(score, pattern=pattern), 0).sum()


@pytest.mark.parametrize("pattern", [(2, 4), (1, 4), (4, 8), (4, 4)])
@pytest.mark.parametrize("seed", range(8))
def test_the_score_that_is_kept_never_falls(pattern, seed):
    score = torch.rand(5, 16, generator=torch.Generator().manual_seed(seed)) ** 4
    inputs = torch.arange(16).view(1, 1, 16)
    order, better = (best_order(score, inputs, pattern, assign=assign)[0] for assign in (False, True))
    assert sorted(order.tolist()) == sorted(better.tolist()) == list(range(16))
    assert kept(score[:, better], pattern) >= kept(score[:, order], pattern) * (1 - 1e-6)
    assert kept(score[:, order], pattern) >= kept(score, pattern)


def test_assigning_by_hand():
    # Runs (9, 8) and (5, 1) of one of two keep 9 + 5. At the first place the 9 beside the 1 and the 5 beside the 8 keep 9 + 8.
    score = torch.tensor([[9.0, 8.0, 5.0, 1.0]])
    assert assigned(score, torch.arange(4), (1, 2)).tolist() == [2, 1, 0, 3]
    # With an order to begin from, its columns are meant: (8, 9) and (1, 5) become (1, 9) and (8, 5).
    assert assigned(score, torch.tensor([1, 0, 3, 2]), (1, 2)).tolist() == [3, 0, 1, 2]


@pytest.mark.parametrize("pattern", [(1, 3), (2, 3)])
@pytest.mark.parametrize("seed", range(6))
def test_the_last_assignment_is_the_best_of_all(pattern, seed):
    score = torch.rand(4, 12, generator=torch.Generator().manual_seed(seed)) ** 3
    order = assigned(score, torch.arange(12), pattern)
    found, best = kept(score[:, order], pattern), 0.0
    for places in itertools.permutations(range(4)):
        runs = order.view(4, 3).clone()
        runs[:, 2] = runs[list(places), 2]
        best = max(best, float(kept(score[:, runs.flatten()], pattern)))
    assert float(found) == pytest.approx(best, rel=1e-6)


def test_assigning_parts_columns_that_are_strong_in_the_same_row():
    # All columns sum to 9, so that dealing has nothing to go by: its runs, as the first ones, hold two rows' strong columns twice.
    score = torch.zeros(4, 16)
    for column, row in enumerate([0, 0, 1, 1, 1, 1, 0, 0, 2, 2, 3, 3, 3, 3, 2, 2]):
        score[row, column] = 9
    order, better = (best_order(score, torch.arange(16).view(1, 1, 16), (1, 4), assign=assign)[0] for assign in (False, True))
    assert kept(score[:, order], (1, 4)) == 8 * 9
    assert kept(score[:, better], (1, 4)) == 16 * 9


def test_scores_that_are_not_finite_have_no_order():
    score = torch.ones(2, 8)
    score[1, 3] = torch.nan
    with pytest.raises(SiteError, match="Some scores are NaN or infinite"):
        best_order(score, torch.arange(8).view(1, 1, 8), (2, 4))


def test_strong_columns_that_stand_together_are_parted():
    score = torch.tensor([[9.0, 9, 9, 9, 1, 1, 1, 1]])
    order = best_order(score, torch.arange(8).view(1, 1, 8), (2, 4))[0]
    assert kept(score, (2, 4)) == 20
    assert kept(score[:, order], (2, 4)) == 36


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("seed", range(8))
def test_copies_of_a_run_move_alike_and_are_weighed_together(assign, seed):
    # Runs of four with two copies: columns 0 to 3 and 4 to 7 hold copies of run 0, and stay as they are or move both.
    score = torch.rand(3, 16, generator=torch.Generator().manual_seed(seed))
    order = best_order(score, torch.arange(16).view(2, 2, 4), (1, 2), assign=assign)
    assert order.shape == (2, 4)
    moved = torch.cat([score[:, 4 * part : 4 * part + 4][:, order[part // 2]] for part in range(4)], 1)
    assert kept(moved, (1, 2)) >= kept(score, (1, 2))


def test_the_strength_of_a_column_is_that_of_all_its_copies():
    # By the first copy alone, the first column would go with the second, as they stand; the other copy has both strong.
    score = torch.tensor([[4.0, 1, 3, 2, 90, 90, 1, 1]])
    order = best_order(score, torch.arange(8).view(1, 2, 4), (1, 2))[0]
    assert sorted(sorted(order[place : place + 2].tolist()) for place in (0, 2)) == [[0, 3], [1, 2]]

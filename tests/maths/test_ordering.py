import pytest
import torch

from modelwright.maths.masks import lowest
from modelwright.maths.ordering import best_order, dealt


def test_dealing_by_hand():
    # Sorted 9 8 7 6 5 4 3 2 in two strips of four; the second is turned: runs 9 2, 8 3, 7 4, 6 5.
    strength = torch.tensor([2.0, 9.0, 4.0, 7.0, 5.0, 3.0, 8.0, 6.0])
    assert strength[dealt(strength, 2)].tolist() == [9, 2, 8, 3, 7, 4, 6, 5]
    assert strength[dealt(strength, 4)].tolist() == [9, 6, 5, 2, 8, 7, 4, 3]


def kept(score, pattern):
    return score.masked_fill(lowest(score, pattern=pattern), 0).sum()


@pytest.mark.parametrize("pattern", [(2, 4), (1, 4), (4, 8)])
@pytest.mark.parametrize("seed", range(8))
def test_the_score_that_is_kept_never_falls(pattern, seed):
    score = torch.rand(5, 16, generator=torch.Generator().manual_seed(seed)) ** 4
    inputs = torch.arange(16).view(1, 1, 16)
    order = best_order(score, inputs, pattern)
    assert sorted(order[0].tolist()) == list(range(16))
    assert kept(score[:, order[0]], pattern) >= kept(score, pattern)


def test_strong_columns_that_stand_together_are_parted():
    score = torch.tensor([[9.0, 9, 9, 9, 1, 1, 1, 1]])
    order = best_order(score, torch.arange(8).view(1, 1, 8), (2, 4))[0]
    assert kept(score, (2, 4)) == 20
    assert kept(score[:, order], (2, 4)) == 36


def test_copies_of_a_run_move_alike_and_are_weighed_together():
    # Runs of four with two copies: columns 0 to 3 and 4 to 7 hold copies of run 0, and stay as they are or move both.
    score = torch.rand(3, 16, generator=torch.Generator().manual_seed(0))
    order = best_order(score, torch.arange(16).view(2, 2, 4), (1, 2))
    assert order.shape == (2, 4)
    moved = torch.cat([score[:, 4 * part : 4 * part + 4][:, order[part // 2]] for part in range(4)], 1)
    assert kept(moved, (1, 2)) >= kept(score, (1, 2))

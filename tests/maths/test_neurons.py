import pytest
import torch

from modelwright.maths.neurons import GRID, Neurons, highest_level


def neurons(tokens=20, count=12, out=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return Neurons(torch.randn(tokens, count, generator=generator), torch.randn(out, count, generator=generator))


def test_a_case_by_hand():
    # Columns (3, 0) and (0, 4). Token (1, 1) writes (3, 4), of size 5; contributions 3 and 4. Token (2, 0) writes (6, 0).
    found = Neurons(torch.tensor([[1.0, 1.0], [2.0, 0.0]]), torch.tensor([[3.0, 0.0], [0.0, 4.0]]))
    assert found.sizes.tolist() == [[3.0, 4.0], [6.0, 0.0]]
    assert found.share(0.0) == 0
    assert found.share(3.0) == pytest.approx((3 / 5 + 0) / 2)
    assert found.share(4.0) == pytest.approx((1 + 0) / 2)
    assert found.share(6.0) == 1


def test_the_threshold_is_the_largest_of_the_grid_within_the_share():
    found = neurons()
    for share in (0.05, 0.2, 0.5):
        threshold = found.threshold(share)
        step = (found._high - found._low) / (GRID - 1)
        assert found.share(threshold) <= share
        assert found.share(threshold + 1.01 * step) > share or threshold == found._high


def test_larger_shares_give_no_smaller_thresholds():
    thresholds = [neurons().threshold(share / 50) for share in range(51)]
    assert thresholds == sorted(thresholds)
    assert thresholds[0] == 0
    assert thresholds[-1] > thresholds[10] > 0


def test_where_the_lowest_contribution_is_too_much_the_threshold_is_0_and_not_the_highest():
    found = Neurons(torch.ones(3, 2), torch.eye(2))
    assert found.threshold(0.1) == 0
    assert found.share(0.0) == 0


def test_tokens_that_write_nothing_lose_nothing():
    found = Neurons(torch.zeros(4, 3), torch.ones(2, 3))
    assert found.share(1.0) == 0


def test_the_highest_level_is_found_to_the_last_halving():
    assert highest_level(lambda level: level <= 0.3, 1.0, 20) == pytest.approx(0.3, abs=2**-20)
    assert highest_level(lambda level: True, 1.5, 3) == 1.5
    assert highest_level(lambda level: level == 0, 1.0, 5) == 0
    levels = [highest_level(lambda level, most=most: (level * 7) % 1 <= most, 1.0, 12) for most in (0.1, 0.3, 0.5, 0.7)]
    assert levels == sorted(levels)

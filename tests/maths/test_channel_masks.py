import math

import pytest
import torch

from modelwright.maths.channel_masks import not_orthogonal, sharp_mask, sharpness, soft_mask, too_many, undecided


def test_the_mask_is_1_at_first_half_open_until_the_middle_and_sharp_at_the_end():
    logits = torch.tensor([0.0, 0.4, -0.4])
    assert soft_mask(logits, 0, 1000).tolist() == [1.0, 1.0, 1.0]
    at = soft_mask(logits, 250, 1000)
    slope = 1 / (1 - math.log(250) / math.log(1000))
    assert at.tolist() == pytest.approx([0.75, 0.25 + 1 / (1 + math.exp(-0.4 * slope)), 0.25 + 1 / (1 + math.exp(0.4 * slope))], abs=1e-4)
    last = soft_mask(logits, 10**6 - 1, 10**6)
    assert last.tolist() == pytest.approx([0.5, 1.0, 0.0], abs=1e-6)
    assert sharpness(0, 100) == 0.0
    assert sharpness(1, 100) == pytest.approx(1.0)
    assert sharpness(100, 100) == pytest.approx(1e6)
    values = [sharpness(step, 300) for step in range(300)]
    assert values == sorted(values)


def test_the_sharp_mask_keeps_the_highest_and_of_equals_the_first():
    logits = torch.tensor([0.3, -0.3, 0.0, 0.3, 0.0], requires_grad=True)
    assert sharp_mask(logits, 3).tolist() == [1.0, 0.0, 1.0, 1.0, 0.0]
    assert sharp_mask(logits, 5).tolist() == [1.0] * 5
    assert not sharp_mask(logits, 3).requires_grad
    assert soft_mask(logits, 3, 10).requires_grad


def test_the_count_of_channels_by_hand():
    for values, width, loss, slope in (([0.0, 0.5, -1.0], 1, 10.0, 10.0), ([0.1, -0.2, -0.3, -1.0], 2, 5.0, -5.0)):
        logits = torch.tensor(values, requires_grad=True)
        found = too_many(logits, width)
        found.backward()
        assert found.item() == pytest.approx(loss)
        assert logits.grad.tolist() == pytest.approx([slope] * len(values))


def test_the_pull_to_either_side_by_hand_and_without_a_side():
    logits = torch.tensor([0.7, 0.5, -0.1], requires_grad=True)
    found = undecided(logits)
    found.backward()
    assert found.item() == pytest.approx(0.04 / 2 + 0.16)
    assert logits.grad.tolist() == pytest.approx([0.2, 0.0, 0.8])
    zeros = torch.zeros(4, requires_grad=True)
    found = undecided(zeros)
    found.backward()
    assert found.item() == pytest.approx(0.25)
    assert zeros.grad.tolist() == pytest.approx([0.25] * 4)
    assert undecided(torch.ones(3)).item() == pytest.approx(0.25)


def test_rows_that_are_orthogonal_and_of_length_1_cost_nothing():
    rows = torch.linalg.qr(torch.randn(12, 5, generator=torch.Generator().manual_seed(0)))[0].T
    assert not_orthogonal(rows).item() < 1e-12
    assert not_orthogonal(torch.tensor([[2.0, 0.0], [0.0, 1.0]])).item() == pytest.approx(9 / 4)

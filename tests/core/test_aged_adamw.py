import copy

import pytest
import torch
from torch import nn

from modelwright.core.aged_adamw import AgedAdamW
from modelwright.core.sm3 import Sm3


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def stepped(value, optimizer, steps=5):
    for step in range(steps):
        value.grad = normal(*value.shape, seed=step)
        optimizer.step()
    return value


def test_with_all_ages_alike_it_is_adamw():
    settings = dict(lr=0.1, betas=(0.8, 0.9), weight_decay=0.3)
    one, two = nn.Parameter(normal(6, 4, seed=9)), nn.Parameter(normal(6, 4, seed=9))
    stepped(one, AgedAdamW([one], **settings))
    stepped(two, torch.optim.AdamW([two], **settings))
    assert torch.allclose(one, two, atol=1e-6)


def test_an_entry_that_takes_a_slot_begins_with_the_moments_of_the_steps_it_was_watched_by_hand():
    # β = (0.5, 0.75), seeded with mean 2 and square 8 over 2 steps: m = 2 · 0.75, v = 8 · (1 - 0.5625). A third step with gradient 4:
    # m = 0.75 + 2 = 2.75, v = 0.75 · 3.5 + 0.25 · 16 = 6.625, corrected by 1 - 0.125 and 1 - 0.421875; no other entry's age is 3.
    value = nn.Parameter(torch.zeros(2))
    optimizer = AgedAdamW([value], lr=1.0, betas=(0.5, 0.75), eps=0.0, weight_decay=0.0)
    optimizer.replace(value, torch.tensor([1]), torch.tensor([2.0]), torch.tensor([8.0]), 2)
    assert optimizer.state[value]["first"].tolist() == [0, 1.5]
    assert optimizer.state[value]["second"].tolist() == [0, 3.5]
    value.grad = torch.tensor([4.0, 4.0])
    optimizer.step()
    assert value.tolist() == pytest.approx([-1, -(2.75 / 0.875) / (6.625 / 0.578125) ** 0.5])
    assert optimizer.state[value]["age"].tolist() == [1, 3]


def test_an_entry_that_is_not_watched_begins_as_a_new_one():
    one, two = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(1))
    first, second = AgedAdamW([one], lr=0.1, weight_decay=0.0), AgedAdamW([two], lr=0.1, weight_decay=0.0)
    stepped(one, first)
    with torch.no_grad():
        one[1] = 0
    first.replace(one, torch.tensor([1]), torch.zeros(1), torch.zeros(1), 0)
    for step in range(3):
        gradient = normal(3, seed=step + 20)
        one.grad, two.grad = gradient, gradient[1:2]
        first.step()
        second.step()
    assert one[1].item() == pytest.approx(two.item())


@pytest.mark.parametrize("make", [AgedAdamW, Sm3])
def test_what_is_saved_comes_back_to_the_bit(make):
    value = nn.Parameter(normal(4, 3).bfloat16())
    optimizer = make([value], lr=0.1)
    value.grad = normal(4, 3, seed=1).bfloat16()
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    other = make([value], lr=0.1)
    other.load_state_dict(saved)
    for key, held in optimizer.state[value].items():
        assert held.dtype == torch.float32
        assert torch.equal(held, other.state[value][key])


def test_sm3_by_hand():
    # All zero at first: ν = g², each step of size 1. Rows then hold (4, 9) and columns (9, 4) of g = (1, 2; 3, 0); with g = 1
    # everywhere ν is min(4, 9) + 1, min(4, 4) + 1, min(9, 9) + 1 and min(9, 4) + 1.
    value = nn.Parameter(torch.zeros(2, 2))
    optimizer = Sm3([value], lr=1.0)
    value.grad = torch.tensor([[1.0, 2], [3, 0]])
    optimizer.step()
    assert value.tolist() == [[-1, -1], [-1, 0]]
    assert [held.tolist() for held in optimizer.numbers(value)] == [[4, 9], [9, 4]]
    value.grad = torch.ones(2, 2)
    before = value.detach().clone()
    optimizer.step()
    assert torch.allclose(before - value, torch.tensor([[5.0, 5], [10, 5]]) ** -0.5)
    assert [held.tolist() for held in optimizer.numbers(value)] == [[5, 10], [10, 5]]


def test_sm3_of_all_entries_of_a_matrix_is_sm3_of_the_matrix_and_holds_rows_and_columns_alone():
    matrix, entries = nn.Parameter(normal(5, 3, seed=8)), nn.Parameter(normal(5, 3, seed=8).flatten())
    whole, few = Sm3([matrix], lr=0.1, weight_decay=0.1), Sm3([entries], lr=0.1, weight_decay=0.1)
    few.entries = {entries: ((5, 3), torch.arange(15, dtype=torch.int32))}
    for step in range(4):
        matrix.grad = normal(5, 3, seed=step)
        entries.grad = matrix.grad.flatten()
        whole.step()
        few.step()
    assert torch.allclose(matrix.flatten(), entries)
    assert sum(held.numel() for held in few.state[entries].values()) == 5 + 3


def test_sm3_of_a_vector_is_adagrad():
    one, two = nn.Parameter(normal(7, seed=8)), nn.Parameter(normal(7, seed=8))
    stepped(one, Sm3([one], lr=0.1))
    stepped(two, torch.optim.Adagrad([two], lr=0.1))
    assert torch.allclose(one, two, atol=1e-6)

import copy

import pytest
import torch
from torch import nn

from modelwright.core.companded_adamw import CompandedAdamW


def net(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(16, 128), nn.Tanh(), nn.Linear(128, 16))


def trained(optimizer_of, steps=200):
    """The losses of a small net that learns a function."""
    model, target = net(), net(1)
    optimizer = optimizer_of(model.parameters())
    inputs = torch.randn(steps, 32, 16, generator=torch.Generator().manual_seed(2))
    losses = []
    for batch in inputs:
        loss = (model(batch) - target(batch).detach()).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses, optimizer


def test_the_first_step_by_hand():
    # m / (1 - b1) = g and v / (1 - b2) = g²: the weight 2 decays to 2 · (1 - 0.1 · 0.5) and moves by 0.1 against the gradient's sign.
    value = nn.Parameter(torch.tensor([2.0, -2.0]))
    value.grad = torch.tensor([3.0, 0.5])
    CompandedAdamW([value], lr=0.1, weight_decay=0.5).step()
    assert value.tolist() == pytest.approx([1.8, -2.0])


def test_the_loss_falls_as_with_states_of_32_bits():
    settings = dict(lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1)
    exact, _ = trained(lambda params: torch.optim.AdamW(params, **settings))
    found, _ = trained(lambda params: CompandedAdamW(params, **settings))
    end = [sum(losses[-20:]) for losses in (exact, found)]
    assert end[0] < 0.1 * sum(exact[:20])
    assert end[1] == pytest.approx(end[0], rel=0.05)


def test_a_moment_takes_a_byte_and_three_quarters_of_a_bit_for_each_element():
    _, optimizer = trained(CompandedAdamW, steps=2)
    for value, state in optimizer.state.items():
        if value.numel() % 128 == 0:
            held = sum(part.nbytes for name, part in state.items() if name.startswith("first"))
            assert held == value.numel() * (1 + 0.75 / 8)


def test_what_is_saved_comes_back_to_the_bit_in_any_dtype():
    value = nn.Parameter(torch.randn(200, generator=torch.Generator().manual_seed(0)).bfloat16())
    optimizer = CompandedAdamW([value])
    for number in range(3):
        value.grad = torch.randn(200, generator=torch.Generator().manual_seed(number)).bfloat16()
        optimizer.step()
    other = nn.Parameter(value.detach().clone())
    again = CompandedAdamW([other])
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for key, held in optimizer.state[value].items():
        back = again.state[other][key]
        assert back == held if key == "step" else (back.dtype == held.dtype and torch.equal(back.float(), held.float()))
    for one in (value, other):
        one.grad = torch.ones_like(one)
    optimizer.step()
    again.step()
    assert torch.equal(value, other)


def test_its_defaults_are_those_of_adamw():
    value = torch.nn.Parameter(torch.ones(3))
    ours, theirs = CompandedAdamW([value]).defaults, torch.optim.AdamW([value]).defaults
    assert {name: ours[name] for name in ("lr", "betas", "eps", "weight_decay")} == {
        name: theirs[name] for name in ("lr", "betas", "eps", "weight_decay")
    }

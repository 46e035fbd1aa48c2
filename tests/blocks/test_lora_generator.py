import math

import pytest
import torch
from tiny import outputs, tiny

from modelwright.blocks.lora_generator import Experts, LoraGenerator
from modelwright.core.adapters import Update, attach
from modelwright.core.errors import ModelError

ROWS, COLUMNS = 12, 8
START = torch.randn(2, COLUMNS, generator=torch.Generator().manual_seed(5))  # of A, which all experts share
TURN = torch.linalg.qr(torch.randn(ROWS, 4, generator=torch.Generator().manual_seed(6)))[0]


def task(angle, noise=0.0, random=None):
    """The adapter of the task at an angle: B goes around twice as fast as the description, A hardly moves."""
    up = TURN @ torch.tensor([[math.cos(2 * angle), 0], [math.sin(2 * angle), 0], [0, math.cos(angle)], [0, math.sin(angle)]])
    up, down = 0.3 * up, START * (1 + 0.1 * math.sin(angle))
    if noise:
        up, down = (value + noise * torch.randn(value.shape, generator=random) for value in (up, down))
    return {"layer": (up, down)}


def text(angle):
    return torch.tensor([math.cos(angle), math.sin(angle)])


def family(tasks=12, samples=8, noise=0.01):
    random = torch.Generator().manual_seed(0)
    angles = [2 * math.pi * place / tasks for place in range(tasks)]
    found = [[task(angle, noise, random) for _ in range(samples)] for angle in angles]
    return Experts(found, torch.stack([text(angle) for angle in angles])), angles


def miss(pairs, angle):
    """The mean square by which outputs miss those of a task's own adapter, for inputs of size one."""
    (up, down), (own_up, own_down) = pairs["layer"], task(angle)["layer"]
    return (up @ down - own_up @ own_down).square().sum().item()


@pytest.fixture(scope="module")
def trained():
    experts, angles = family(tasks=48)
    torch.manual_seed(0)
    generator = LoraGenerator(experts, count=16, temperature=1.0, latent=4, hidden=64, width=16)
    losses = generator.fit(steps=250, learning_rate=2e-3, batch=48)
    return generator.eval(), angles, losses


def test_it_beats_averages_on_tasks_that_it_never_saw(trained):
    generator, angles, losses = trained
    between = [angle + share * (angles[1] - angles[0]) for angle in angles for share in (0.3, 0.5)]
    with torch.no_grad():  # the mean of experts at many angles is too short, which the generator has learnt to make up for
        made = sum(miss(generator(text(angle)), angle) for angle in between)
        nearest = sum(miss(generator.experts.average(text(angle), 16, 1.0), angle) for angle in between)
        soup = sum(miss(generator.experts.average(text(angle), 99, 1e9), angle) for angle in between)
    assert losses[-1] < losses[0] / 4
    assert made < 0.5 * nearest < soup


def test_a_mean_by_hand():
    # B = (1) and (3), alike in description: μ* = 2 and σ*² = the mean of 0 and 0, and of 1 and 1 for the experts' distance.
    pairs = [[{"a": (torch.tensor([[value]]), torch.tensor([[1.0]]))}] for value in (1.0, 3.0)]
    experts = Experts(pairs, torch.ones(2, 3))
    mean, variance = experts.condition(torch.ones(3), 2, 0.1)
    found = experts.pairs(mean)["a"]
    assert (found[0].item(), found[1].item()) == (pytest.approx(2.0), pytest.approx(1.0))
    assert variance[0].item() * experts.spread[0].item() ** 2 == pytest.approx(1.0)
    alone = experts.condition(torch.ones(3), 2, 0.1, without=0)
    assert experts.pairs(alone[0])["a"][0].item() == pytest.approx(3.0)


def test_shares_are_of_the_nearest_and_leave_out_the_task_itself():
    experts, angles = family(tasks=6)
    shares = experts.shares(text(angles[2]), 3, 0.1)
    assert shares.count_nonzero() == 3
    assert shares.sum().item() == pytest.approx(1)
    assert shares.argmax() == 2
    assert experts.shares(text(angles[2]), 3, 0.1, without=2)[2] == 0
    assert torch.equal(experts.shares(text(angles[2]), 1, 0.1).nonzero().flatten(), torch.tensor([2]))


def test_the_description_of_an_expert_gives_something_like_it(trained):
    generator, angles, _ = trained
    apart = [miss(task(one), two) for one in angles for two in angles if one != two]
    generator.count = 1
    with torch.no_grad():
        errors = [miss(generator(text(angle)), angle) for angle in angles]
    generator.count = 16
    assert max(errors) < sum(apart) / len(apart)


def test_the_priors_mean_is_one_answer_and_draws_are_many(trained):
    generator, angles, _ = trained
    one, two = generator(text(angles[1])), generator(text(angles[1]))
    assert all(torch.equal(value, other) for value, other in zip(one["layer"], two["layer"], strict=True))
    torch.manual_seed(0)
    drawn = [generator(text(angles[1]), draw=True)["layer"][0] for _ in range(2)]
    assert not torch.equal(*drawn)


def test_the_divergence_is_never_below_zero_and_zero_where_both_agree(trained):
    generator, _, _ = trained
    experts = generator.experts
    conditions = torch.stack([experts.condition(one, 4, 0.1) for one in experts.texts])
    for samples in range(3):
        assert generator.loss(experts.values[:, samples], conditions)[1] >= 0
    with torch.no_grad():
        blind = LoraGenerator(experts, latent=3, hidden=8, width=4)
        for network in (blind.encoder, blind.prior):
            network[-1].weight.zero_()
            network[-1].bias.fill_(0.3)
        assert blind.loss(experts.values[:, 0], conditions)[1].item() == pytest.approx(0, abs=1e-6)


def test_without_the_divergence_it_gives_its_samples_back():
    experts, _ = family(tasks=3, samples=2, noise=0.1)
    torch.manual_seed(0)
    generator = LoraGenerator(experts, balance=0.0, latent=8, hidden=64, width=16)
    losses = generator.fit(steps=200, learning_rate=3e-3, batch=32)
    assert losses[-1] < 0.05 * losses[0]


def test_what_it_makes_has_the_experts_tensors_and_goes_on_a_model(trained):
    experts, _ = family(tasks=3)
    for values, pairs in zip(experts.values[:, 0], [task(0.0)] * 3, strict=True):
        assert {path: tuple(map(torch.Tensor.size, pair)) for path, pair in experts.pairs(values).items()} == {
            path: tuple(map(torch.Tensor.size, pair)) for path, pair in pairs.items()
        }
    path = "model.layers.0.self_attn.q_proj"
    samples = [[{path: (torch.full((64, 1), value), torch.full((1, 64), 0.1))}] for value in (0.1, 0.2)]
    generator = LoraGenerator(Experts(samples, torch.eye(2)), hidden=8, width=4)
    made = {where: Update(up.detach(), down.detach()) for where, (up, down) in generator(torch.tensor([1.0, 0.2])).items()}
    model = attach(tiny(), made, {})
    assert not torch.allclose(outputs(model), outputs(tiny()), atol=1e-4)


def test_experts_must_be_alike():
    one, other = task(0.0), {"layer": (torch.zeros(ROWS, 3), torch.zeros(3, COLUMNS))}
    with pytest.raises(ModelError, match=r"The adapters differ in layers or ranks\. Train all with the same settings"):
        Experts([[one], [other]], torch.eye(2))
    with pytest.raises(ModelError, match=r"There are 2 tasks and 3 texts\. Give two tasks or more"):
        Experts([[one], [one]], torch.eye(3))

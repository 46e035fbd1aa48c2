import torch

from modelwright.maths.allocation import moved_to_mean
from modelwright.maths.genetic import fittest

WANTED = torch.tensor([0.1, 0.5, 0.6, 0.2], dtype=torch.float64)  # of mean 0.35


def cost(member):
    return float((member - WANTED).square().sum())


def settled(member):
    return moved_to_mean(member, torch.ones_like(member), 0.35)


def search(generations, first=None):
    first = torch.full((4,), 0.35, dtype=torch.float64) if first is None else first
    return fittest(first, cost, settled, 8, generations, 0.1, torch.Generator().manual_seed(0))


def test_it_comes_nearer_with_generations_and_stays_on_what_is_allowed():
    costs = [search(generations)[1] for generations in (0, 2, 10, 40)]
    assert costs == sorted(costs, reverse=True)
    assert costs[-1] < 0.1 * costs[0]
    found, least = search(40)
    assert abs(float(found.mean()) - 0.35) < 1e-9
    assert cost(found) == least


def test_it_is_never_worse_than_where_it_began():
    found, least = search(5, WANTED.clone())
    assert torch.equal(found, WANTED)
    assert least == 0


def test_the_same_generator_gives_the_same_result():
    assert torch.equal(search(5)[0], search(5)[0])

import torch

from modelwright.maths.allocation import moved_to_mean
from modelwright.maths.genetic import evolved, fittest

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


CHOICES = (range(1, 9), range(0, 50, 5), (2, 3, 5, 7))


def chosen(generations, crossover=0.6, seed=0):
    def fitness(genes):
        tried.append(genes)
        return -abs(genes[0] * genes[1] + genes[2] - 122)

    tried = []
    best, history = evolved(CHOICES, fitness, lambda genes: genes, 6, generations, crossover, torch.Generator().manual_seed(seed))
    assert fitness(best) == history[-1]
    return best, history, tried[:-1]


def test_genes_come_nearer_and_the_best_is_never_lost():
    best, history, tried = chosen(60)
    assert history == sorted(history)
    assert len(history) == 61
    assert history[-1] >= -1
    assert all(gene in choice for genes in tried for gene, choice in zip(genes, CHOICES, strict=True))
    assert chosen(60)[0] == best


def test_no_genes_are_rated_while_they_live():
    _, _, tried = chosen(0)
    assert len(set(tried)) == len(tried)


def test_children_of_both_have_only_genes_that_were_there():
    _, _, first = chosen(0)
    _, _, tried = chosen(20, crossover=1.0)
    assert all({genes[place] for genes in tried} <= {genes[place] for genes in first} for place in range(3))

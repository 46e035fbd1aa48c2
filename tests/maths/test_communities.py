import pytest
import torch

from modelwright.maths.communities import communities, neighbours, shared_rows


def planted(blocks, seed=0):
    """Edges of a bipartite graph of blocks of 6 × 5 nodes that nothing joins, three quarters of each block's edges."""
    rng = torch.Generator().manual_seed(seed)
    left, right = [], []
    for block in range(blocks):
        chosen = (torch.rand(6, 5, generator=rng) < 0.75).nonzero()
        left.append(chosen[:, 0] + 6 * block)
        right.append(chosen[:, 1] + 5 * block)
    left, right = torch.cat(left), torch.cat(right)
    return left, right, torch.ones(len(left))


@pytest.mark.parametrize("blocks", [2, 4])
def test_planted_communities_are_found_without_mixing(blocks):
    left, right = communities(*planted(blocks), resolution=1.0, seed=0)
    for labels, size in ((left, 6), (right, 5)):
        owners = [set(labels[size * block : size * (block + 1)].tolist()) for block in range(blocks)]
        assert all(not one & two for n, one in enumerate(owners) for two in owners[n + 1 :])


def test_labels_are_contiguous_on_each_side():
    for resolution in (0.5, 1.0, 4.0, 64.0):
        for labels in communities(*planted(3), resolution=resolution, seed=1):
            assert sorted(set(labels.tolist())) == list(range(int(labels.max()) + 1))


def test_a_higher_resolution_gives_more_communities():
    found = [int(communities(*planted(3), resolution=resolution, seed=0)[0].max()) + 1 for resolution in (0.5, 3.0, 100.0)]
    assert found[0] < found[1] < found[2]


def test_one_seed_gives_the_same_labels_whatever_the_order_of_edges():
    left, right, weights = planted(3)
    one, two = communities(left, right, weights, 2.0, 5), communities(left.flip(0), right.flip(0), weights, 2.0, 5)
    assert all(torch.equal(*sides) for sides in zip(one, two, strict=True))


def test_nodes_without_edges_have_no_community():
    left, _ = communities(torch.tensor([0, 3]), torch.tensor([0, 1]), torch.ones(2), 1.0, 0)
    assert left.tolist() == [0, -1, -1, 1]


def test_neighbours_by_hand():
    # 4 2 4 2: after 4 comes 2 twice, after 2 comes 4 once; before 2 stands 4 twice, before 4 stands 2 once.
    token, context, often = neighbours([torch.tensor([4, 2, 4, 2])], 1, 10)
    found = {(one, two): number for one, two, number in zip(token.tolist(), context.tolist(), often.tolist(), strict=True)}
    assert found == {(4, 2): 2, (2, 4): 1, (2, 14): 2, (4, 12): 1}
    token, context, often = neighbours([torch.tensor([1, 2, 3])], 2, 10)
    assert (1, 23, 1) in list(zip(token.tolist(), context.tolist(), often.tolist(), strict=True))
    assert [len(each) for each in neighbours([torch.tensor([7])], 1, 10)] == [0, 0, 0]


def test_rows_with_one_lookup_are_weighted_means():
    rows = torch.tensor([[1.0, 2], [3, 6], [5, 5]])
    table = shared_rows(rows, torch.tensor([[0, 0, 2]]), 4, torch.tensor([3.0, 1, 2]))
    assert table.tolist() == [[1.5, 3.0], [0.0, 0.0], [5.0, 5.0], [0.0, 0.0]]


def test_rows_with_two_lookups_are_the_least_squares():
    rng = torch.Generator().manual_seed(0)
    rows, weights = torch.randn(40, 3, generator=rng, dtype=torch.float64), torch.rand(40, generator=rng, dtype=torch.float64) + 0.1
    places = torch.randint(0, 12, (2, 40), generator=rng)
    table = shared_rows(rows, places, 12, weights)
    matrix = torch.zeros(40, 12, dtype=torch.float64)
    for each in places:
        matrix[torch.arange(40), each] += 1
    roots = weights.sqrt()[:, None]
    best = torch.linalg.lstsq(roots * matrix, roots * rows).solution
    assert torch.allclose(table, best, atol=1e-8)


def test_rows_that_are_sums_are_found():
    table = torch.randn(6, 2, generator=torch.Generator().manual_seed(0))
    places = torch.tensor([[0, 1, 2, 3, 4, 5, 0, 1, 2, 3], [1, 2, 3, 4, 5, 0, 2, 3, 5, 1]])
    found = shared_rows(table[places].sum(0), places, 6, torch.ones(10))
    assert torch.allclose(found, table, atol=1e-5)

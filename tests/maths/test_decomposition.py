import pytest
import torch

from modelwright.maths.decomposition import rest


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def planted(rank=5, count=12, size=1.0):
    """A matrix of low rank, a little noise, and a few large entries, with their places."""
    places = torch.randperm(40 * 30, generator=torch.Generator().manual_seed(5))[:count]
    spikes = torch.zeros(40 * 30).index_fill(0, places, size)
    return normal(40, rank) @ normal(rank, 30, seed=1) + 1e-4 * normal(40, 30, seed=2) + spikes.view(40, 30), places


@pytest.mark.parametrize("shape", [(40, 30), (30, 40)])
def test_entries_that_were_added_to_low_rank_are_the_rest(shape):
    torch.manual_seed(0)
    weight, places = planted()
    weight = weight if shape == (40, 30) else weight.T
    found = rest(weight, rounds=1, directions=5, threshold=5.0)
    found = found if shape == (40, 30) else found.T
    assert set(found.abs().flatten().topk(12).indices.tolist()) == set(places.tolist())


def test_of_low_rank_alone_nothing_is_left_in_one_round():
    torch.manual_seed(0)
    weight = normal(40, 4) @ normal(4, 30, seed=1)
    assert rest(weight, rounds=1, directions=4).abs().max() < 1e-2
    assert rest(weight, rounds=1, directions=1).abs().max() > 1


def test_more_rounds_leave_less():
    weight, sizes = normal(40, 30), []
    for rounds in (1, 2, 4):
        torch.manual_seed(0)
        sizes.append(float(rest(weight, rounds, threshold=10.0).norm()))
    assert sizes[0] > sizes[1] > sizes[2] > 0


def test_it_ends_before_the_full_rank():
    torch.manual_seed(0)
    found = rest(normal(7, 6), rounds=100)
    assert torch.linalg.matrix_rank(found, tol=1e-3) >= 1
    assert found.shape == (7, 6)

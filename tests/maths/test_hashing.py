"""Maps from weights to stored values."""

import pytest
import torch

from modelwright.maths.hashing import EDGE, PRIME, Map, divisor, hashed, projected, sums

SHAPES = [(24, 40), (64, 33), (7, 96)]
FORMS = ["pareto", "roast", "hashednet"]


def maps_of(form, size, seed=0, scales=(1.0, 0.5, 3.0)):
    """Three matrices one after the other in the numbering."""
    offsets = [0, 24 * 40, 24 * 40 + 64 * 33]
    return [Map(form, size, seed, *rest) for rest in zip(offsets, SHAPES, scales, strict=True)]


def matrix_of(maps, size):
    """R [weights, size], written out."""
    rows = []
    for one in maps:
        places, factors = one.places(0, one.shape[0])
        part = torch.zeros(len(places), size, dtype=torch.float64)
        part[torch.arange(len(places)), places] = factors.double()
        rows.append(part)
    return torch.cat(rows)


def test_the_hash_by_hand_and_without_overflow():
    a, b, c = torch.randint(1, PRIME // 2, (3,), generator=torch.Generator().manual_seed(5)).tolist()
    a, b = 2 * a - 1, 2 * b - 1
    numbers = [0, 1, 2, 1000, 2**31, 10**12]
    found = hashed(torch.tensor(numbers), 1009, 5).tolist()
    assert found == [((a * (x % PRIME) + b * (x % PRIME) ** 2 + c) % PRIME) % 1009 for x in numbers]


@pytest.mark.parametrize("size", [100, 977, 1600, 3743])
def test_pareto_loads_differ_by_one_at_most_over_all_matrices(size):
    total = sum(rows * columns for rows, columns in SHAPES)
    *_, loads = sums(maps_of("pareto", size), size)
    assert set(loads.tolist()) <= {total // size, -(-total // size)}
    assert loads.sum() == total


def test_a_full_pareto_array_is_a_bijection_and_gives_the_weights_back():
    total = sum(rows * columns for rows, columns in SHAPES)
    maps, weights = maps_of("pareto", total), [torch.randn(shape) for shape in SHAPES]
    assert sums(maps, total)[2].tolist() == [1] * total
    values = projected(weights, maps, total)
    for weight, one in zip(weights, maps, strict=True):
        assert torch.allclose(one.read(values, 0, len(weight)), weight, atol=1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_each_weight_has_one_place_that_the_seed_alone_decides(form):
    one, same, other = (maps_of(form, 1500, seed)[1] for seed in (3, 3, 4))
    places, factors = one.places(0, 64)
    assert int(places.min()) >= 0
    assert int(places.max()) < 1500
    assert set(factors.tolist()) == {-0.5, 0.5}
    assert abs(float(factors.mean())) < 0.1
    for found, again in zip((places, factors), same.places(0, 64), strict=True):
        assert torch.equal(found, again)
    assert not torch.equal(places, other.places(0, 64)[0])
    assert torch.equal(one.places(10, 20)[0], places[10 * 33 : 20 * 33])


def test_a_block_of_roast_is_read_in_one_piece():
    places = maps_of("roast", 3000)[1].places(0, 64)[0].view(64, 33)
    block = places[32:64, :32]
    assert torch.equal(block - block[0, 0], torch.arange(EDGE**2).view(EDGE, EDGE))
    assert int(places.max()) < 3000


@pytest.mark.parametrize("form", FORMS)
def test_reading_and_adding_are_r_and_its_transpose(form):
    size = 1500
    maps, values = maps_of(form, size), torch.randn(size, dtype=torch.float64)
    whole = matrix_of(maps, size)
    read = torch.cat([one.read(values, 0, one.shape[0]).flatten() for one in maps])
    assert torch.allclose(read, whole @ values)
    gradients, total = [torch.randn(shape, dtype=torch.float64) for shape in SHAPES], torch.zeros(size, dtype=torch.float64)
    for one, gradient in zip(maps, gradients, strict=True):
        one.add(total, gradient[:5], 0, 5)
        one.add(total, gradient[5:], 5, one.shape[0])
    assert torch.allclose(total, whole.T @ torch.cat([gradient.flatten() for gradient in gradients]))


@pytest.mark.parametrize("form", FORMS)
def test_the_projected_values_are_those_of_least_squares(form):
    size = 1500
    maps, weights = maps_of(form, size), [torch.randn(shape) for shape in SHAPES]
    flat = torch.cat([weight.flatten() for weight in weights]).double()
    whole, found = matrix_of(maps, size), projected(weights, maps, size).double()
    assert torch.allclose(whole.T @ (whole @ found - flat), torch.zeros(size, dtype=torch.float64), atol=1e-4)
    assert float(found.abs().max()) > 0.1


def test_divisors_by_hand():
    maps = [Map("pareto", 2, 0, 0, (1, 2), 3.0), Map("pareto", 2, 0, 2, (1, 4), 1.0)]
    assert divisor(maps, 2, "projection").tolist() == [11, 11]  # 9 + 1 + 1
    assert divisor(maps, 2, "root").tolist() == pytest.approx([11**0.5] * 2)
    assert divisor(maps, 2, "mean").tolist() == pytest.approx([25 / 3] * 2)  # (3 + 1 + 1)² / 3
    assert divisor(maps, 2, "none").tolist() == [1, 1]
    assert 1.0 in divisor([Map("hashednet", 50, 0, 0, (1, 2), 3.0)], 50, "projection").tolist()


def test_signs_have_nothing_to_do_with_places():
    # With one hash for both, a value would be read with one sign alone, that of its place's parity.
    places, factors = Map("hashednet", 64, 3, 0, (256, 256), 1.0).places(0, 256)
    means = torch.zeros(64).index_add_(0, places, factors) / torch.bincount(places)
    assert float(means.abs().max()) < 0.2

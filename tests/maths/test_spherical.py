import math

import pytest
import torch

from modelwright.maths import slices, spherical


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(autouse=True)
def small_slices(monkeypatch):
    monkeypatch.setattr(slices, "SLICE", 64)


def gram(*vectors):
    stacked = torch.stack(vectors).double().flatten(1)
    return stacked @ stacked.T


VECTORS = [normal(200, 1, seed=seed).flatten() for seed in (1, 2, 3)]


def test_a_quarter_turn_by_hand():
    # Between (1, 0) and (0, 1) at ½: both sines are sin 45° = √½ over sin 90° = 1.
    half = spherical.slerp(gram(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])), 0.5)
    assert half.tolist() == pytest.approx([math.sqrt(0.5)] * 2)


@pytest.mark.parametrize("t", [0.0, 0.25, 0.5, 1.0])
def test_slerp_turns_by_that_share_of_the_angle_and_keeps_the_length(t):
    first, second = (vector / vector.norm() for vector in VECTORS[:2])
    angle = torch.dot(first, second).arccos().item()
    result = spherical.mean([first, second], lambda found: spherical.slerp(found, t), torch.float64).whole()
    assert result.norm().item() == pytest.approx(1, abs=1e-6)
    assert torch.dot(result.float(), first).item() == pytest.approx(math.cos(t * angle), abs=1e-6)


def test_ends_are_exact():
    assert spherical.slerp(gram(*VECTORS[:2]), 0.0).tolist() == [1.0, 0.0]
    assert spherical.slerp(gram(*VECTORS[:2]), 1.0).tolist() == [0.0, 1.0]


def test_vectors_that_are_alike_opposite_or_zero_give_finite_means():
    one, zero = VECTORS[0], torch.zeros(200)
    assert spherical.slerp(gram(one, one), 0.3).tolist() == pytest.approx([0.7, 0.3])
    assert spherical.slerp(gram(one, zero), 0.3).tolist() == pytest.approx([0.7, 0.3])
    for pair in ((one, one), (one, -one), (one, zero), (zero, zero)):
        assert spherical.slerp(gram(*pair), 0.3, 0.9995).isfinite().all()
        assert spherical.karcher_mean(gram(*pair), [0.5, 0.5], 10, 1e-5).isfinite().all()
        assert spherical.tangent_mean(gram(*pair), [0.5, 0.5]).isfinite().all()


def test_rows_have_coefficients_of_their_own():
    tensors = [normal(30, 50, seed=seed) for seed in (1, 2)]
    found = spherical.mean(tensors, lambda found: spherical.slerp(found, 0.3), torch.float32, by_row=True).whole()
    for row in range(30):
        alone = [tensor[row] for tensor in tensors]
        expected = spherical.mean(alone, lambda found: spherical.slerp(found, 0.3), torch.float32).whole()
        assert torch.allclose(found[row], expected, atol=1e-6)


def test_the_tangent_mean_has_the_direction_of_the_summed_directions():
    weights = [0.2, 0.3, 0.5]
    shares = spherical.tangent_mean(gram(*VECTORS), weights)
    result = sum(share * vector.double() for share, vector in zip(shares, VECTORS, strict=True))
    direction = sum(weight * vector.double() / vector.double().norm() for weight, vector in zip(weights, VECTORS, strict=True))
    assert torch.allclose(result / result.norm(), direction / direction.norm())
    assert result.norm().item() == pytest.approx(
        sum(weight * vector.norm().item() for weight, vector in zip(weights, VECTORS, strict=True))
    )


def test_the_karcher_mean_has_no_slope_left():
    weights = [0.2, 0.3, 0.5]
    shares = spherical.karcher_mean(gram(*VECTORS), weights, 100, 1e-12)
    mean = sum(share * vector.double() for share, vector in zip(shares, VECTORS, strict=True))
    mean = mean / mean.norm()
    slope = torch.zeros(200).double()
    for weight, vector in zip(weights, VECTORS, strict=True):
        unit = vector.double() / vector.double().norm()
        cosine = unit @ mean
        slope += weight * cosine.arccos() / (1 - cosine**2).sqrt() * (unit - cosine * mean)
    assert slope.norm() < 1e-10


def test_two_vectors_have_their_karcher_mean_half_way():
    units = [vector / vector.norm() for vector in VECTORS[:2]]
    found = spherical.karcher_mean(gram(*units), [0.5, 0.5], 10, 1e-5)
    assert torch.allclose(found, spherical.slerp(gram(*units), 0.5))
    uneven = spherical.karcher_mean(gram(*units), [0.7, 0.3], 50, 1e-10)
    assert torch.allclose(uneven, spherical.slerp(gram(*units), 0.3))

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


@pytest.mark.parametrize("by_row", [False, True])
def test_a_base_is_taken_off_and_put_back(by_row):
    base, tensors = normal(6, 30, seed=5), [normal(6, 30, seed=seed) for seed in (1, 2)]
    method = {"coefficients": lambda found: spherical.slerp(found, 0.3), "dtype": torch.float64, "by_row": by_row}
    plain = spherical.mean([tensor.double() - base.double() for tensor in tensors], **method).whole()
    assert torch.allclose(spherical.mean(tensors, base=base, **method).whole(), base.double() + plain)


def test_products_are_summed_over_all_slices_in_float64():
    # 300 entries are five slices; of vectors of length 1e4 float32 would lose what tells them apart.
    first, second = 1e4 * normal(300, seed=1), 1e4 * normal(300, seed=1) + normal(300, seed=2)
    seen = []
    spherical.mean([first, second], lambda found: seen.append(found) or torch.ones(2).double(), torch.float32)
    expected = torch.stack([first, second]).double() @ torch.stack([first, second]).double().T
    assert torch.allclose(seen[0], expected, rtol=1e-12)
    assert seen[0].dtype == torch.float64


def test_empty_tensors_have_a_mean():
    for by_row in (False, True):
        assert spherical.mean(
            [torch.zeros(0, 3)] * 2, lambda found: spherical.slerp(found, 0.3), torch.float32, by_row=by_row
        ).whole().shape == (0, 3)


def test_cosines_lie_between_their_ends_and_are_zero_of_nothing():
    # Products whose rounding would give the cosine 1 + 4e-16, and a vector of length 0.
    rounded = torch.tensor([[1.0, 1.0 + 4e-16, 0.0], [1.0 + 4e-16, 1.0, 0.0], [0.0, 0.0, 0.0]], dtype=torch.float64)
    found = spherical.cosines(rounded)
    assert found.tolist() == [[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 0.0]]


@pytest.mark.parametrize("cosine", [0.9996, -0.9996])
def test_a_line_is_taken_at_either_end_of_the_cosines(cosine):
    pair = torch.tensor([[1.0, cosine], [cosine, 1.0]], dtype=torch.float64)
    assert spherical.slerp(pair, 0.3, 0.9995).tolist() == pytest.approx([0.7, 0.3], abs=1e-12)
    assert spherical.slerp(pair, 0.3).tolist() != pytest.approx([0.7, 0.3], abs=1e-6)


def test_the_karcher_mean_has_the_mean_of_the_lengths():
    weights = [0.2, 0.3, 0.5]
    lengths = [1.0, 5.0, 20.0]
    vectors = [length * vector / vector.norm() for length, vector in zip(lengths, VECTORS, strict=True)]
    shares = spherical.karcher_mean(gram(*vectors), weights, 50, 1e-12)
    found = sum(share * vector.double() for share, vector in zip(shares, vectors, strict=True))
    assert found.norm().item() == pytest.approx(0.2 * 1 + 0.3 * 5 + 0.5 * 20)


def test_a_step_of_the_karcher_mean_by_hand():
    # Axes x, y, z with the weights ½, ½, 0: the tangent mean (1, 1, 0)/√2 is the mean already. With ½, ¼, ¼ one step goes
    # along the logarithms θᵢ/sin θᵢ (vᵢ - cos θᵢ u) from u = (2, 1, 1)/√6, and back onto the sphere by cos and sin of its length.
    axes = torch.eye(3).double()
    assert spherical.karcher_mean(axes, [0.5, 0.5, 0.0], 5, 1e-9).tolist() == pytest.approx([math.sqrt(0.5), math.sqrt(0.5), 0])
    start = torch.tensor([2.0, 1.0, 1.0]).double() / math.sqrt(6)
    step = torch.zeros(3).double()
    for weight, axis in zip([0.5, 0.25, 0.25], axes, strict=True):
        cosine = start @ axis
        step += weight * cosine.arccos() / (1 - cosine**2).sqrt() * (axis - cosine * start)
    once = step.norm().cos() * start + step.norm().sin() * step / step.norm()
    assert torch.allclose(spherical.karcher_mean(axes, [0.5, 0.25, 0.25], 1, 0.0), once, atol=1e-12)

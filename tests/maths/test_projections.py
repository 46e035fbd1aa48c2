import pytest
import torch

from modelwright.maths.projections import draw, fingerprint, project

FORMS = ["dense", "sparse", "fastfood"]


def drawn(form, size, count, seed=0):
    return draw(form, size, count, torch.Generator().manual_seed(seed))


def matrix(form, size, count, arrays):
    """P, column by column."""
    return torch.stack([project(form, unit, size, arrays) for unit in torch.eye(count, dtype=torch.float64)], 1)


def test_a_case_by_hand():
    # z = 3 is (3, 0) filled up; H B gives (3, 3)/√2; Π keeps that; G = (1, 2) gives (3, 6)/√2; H gives (9, -3)/2.
    # The scale is L / √(size · ΣG²) = 2 / √10.
    arrays = (torch.tensor([1, -1], dtype=torch.int8), torch.tensor([1, 0]), torch.tensor([1.0, 2.0]))
    found = project("fastfood", torch.tensor([3.0]), 2, arrays)
    assert torch.allclose(found, torch.tensor([4.5, -1.5]) * 2 / 10**0.5)
    # Two columns with 4 entries ±½ each of 16: one for each stretch of 4.
    places = torch.tensor([[0, 5, 8, 15], [0, 4, 9, 12]])
    signs = torch.tensor([[1, -1, 1, 1], [-1, 1, 1, 1]], dtype=torch.int8)
    expected = torch.zeros(16)
    expected[[0, 5, 8, 15]] = torch.tensor([1.0 - 2.0, -1.0, 1.0, 1.0])
    expected[[4, 9, 12]] = 2.0
    assert torch.equal(project("sparse", torch.tensor([2.0, 4.0]), 16, (places, signs)), expected)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("size", [4096, 3000])
def test_lengths_are_kept(form, size):
    z = torch.randn(50, generator=torch.Generator().manual_seed(1))
    ratios = [project(form, z, size, drawn(form, size, 50, seed)).norm() / z.norm() for seed in range(10)]
    assert 0.95 < torch.stack(ratios).mean() < 1.05
    assert all(0.8 < ratio < 1.2 for ratio in ratios)


@pytest.mark.parametrize("form", FORMS)
def test_gradients_are_the_transposed_map(form):
    size, count = 37, 9
    arrays = drawn(form, size, count)
    z = torch.randn(count, generator=torch.Generator().manual_seed(1), dtype=torch.float64, requires_grad=True)
    gradient = torch.randn(size, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    project(form, z, size, arrays).backward(gradient)
    assert torch.allclose(z.grad, matrix(form, size, count, arrays).T @ gradient)
    assert torch.autograd.gradcheck(lambda value: project(form, value, size, arrays), z)


def test_columns_have_the_length_one_and_the_density_of_the_paper():
    dense, sparse = (matrix(form, 400, 30, drawn(form, 400, 30)) for form in ("dense", "sparse"))
    for found in (dense, sparse):
        assert torch.allclose(found.norm(dim=0), torch.ones(30, dtype=torch.float64), atol=1e-6)
    assert (sparse != 0).float().mean() == pytest.approx(400**-0.5)
    assert dense.all()


def test_as_many_dense_values_as_entries_reach_everything():
    arrays = drawn("dense", 12, 12)
    target = torch.randn(12, generator=torch.Generator().manual_seed(3))
    z = torch.linalg.solve(arrays[0], target)
    assert torch.allclose(project("dense", z, 12, arrays), target, atol=1e-4)


def test_a_fingerprint_tells_seeds_apart():
    assert fingerprint(1) == fingerprint(1) != fingerprint(2)

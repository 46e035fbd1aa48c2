import pytest
import torch

from modelwright.maths.rotations import hadamard, spreading, walsh_hadamard


@pytest.mark.parametrize("size", [1, 2, 4, 8, 12, 20, 24, 28, 36, 40, 48, 60, 64, 108, 140, 192, 256])
def test_rows_of_hadamard_matrices_are_signs_and_orthogonal(size):
    found = hadamard(size)
    assert (found.abs() == 1).all()
    assert torch.equal(found @ found.T, size * torch.eye(size, dtype=torch.float64))


def test_sizes_without_one_are_said():
    assert hadamard(6) is None
    assert hadamard(3) is None
    assert hadamard(92) is None  # which exists, but not by this construction


@pytest.mark.parametrize("size", [12, 64, 6, 92])
def test_spreading_matrices_are_orthogonal_and_follow_the_seed(size):
    one, again, other = (spreading(size, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.allclose(one @ one.T, torch.eye(size, dtype=torch.float64), atol=1e-12)
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


def test_one_entry_far_out_is_spread_evenly():
    x = torch.zeros(64, dtype=torch.float64)
    x[5] = 8
    assert torch.allclose((x @ spreading(64, torch.Generator())).abs(), torch.ones(64, dtype=torch.float64))


def test_the_fast_transform_is_sylvesters_matrix_and_its_own_inverse():
    two = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    matrix = torch.kron(torch.kron(two, two), two)
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert torch.allclose(walsh_hadamard(x), x @ matrix / 8**0.5)
    assert torch.allclose(walsh_hadamard(walsh_hadamard(x)), x)
    assert torch.allclose(matrix @ matrix, 8 * torch.eye(8, dtype=torch.float64))
    assert torch.equal(walsh_hadamard(torch.tensor([3.0])), torch.tensor([3.0]))
    assert torch.autograd.gradcheck(walsh_hadamard, x.requires_grad_())
    with pytest.raises(ValueError, match="these are 6"):
        walsh_hadamard(torch.zeros(6))

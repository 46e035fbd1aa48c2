import pytest
import torch

from modelwright.maths.triangular import lower_diagonal_upper


def test_a_case_by_hand():
    # The largest of the first column, 4, comes first: rows in the order 2, 1. Then 2 - (2/4) · 6 = -1 is left.
    ordered, pivots, upper = lower_diagonal_upper(torch.tensor([[2.0, 2.0], [4.0, 6.0]]))
    assert torch.equal(ordered, torch.tensor([[0.5, 1.0], [1.0, 0.0]]))
    assert torch.equal(pivots, torch.tensor([4.0, -1.0]))
    assert torch.equal(upper, torch.tensor([[1.0, 1.5], [0.0, 1.0]]))


@pytest.mark.parametrize("shape", [(5, 5), (9, 4), (4, 9), (1, 3)])
def test_the_product_is_the_matrix(shape):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ordered, pivots, upper = lower_diagonal_upper(weight)
    assert torch.allclose(ordered * pivots @ upper, weight, atol=1e-12)
    assert ordered.abs().max() <= 1
    assert torch.equal(upper.tril(-1), torch.zeros_like(upper))
    assert torch.allclose(upper.diagonal(), torch.ones(min(shape), dtype=torch.float64))


def test_pivots_of_zero_are_no_divisors():
    weight = torch.ones(4, 3)
    weight[:, 2] = torch.tensor([1.0, 2.0, 3.0, 4.0])
    ordered, pivots, upper = lower_diagonal_upper(weight)
    assert all(value.isfinite().all() for value in (ordered, pivots, upper))
    assert torch.allclose(ordered * pivots @ upper, weight, atol=1e-6)
    nothing = lower_diagonal_upper(torch.zeros(3, 3))
    assert all(value.isfinite().all() for value in nothing)
    assert not (nothing[0] * nothing[1] @ nothing[2]).any()


def test_shapes_of_empty_matrices():
    found = lower_diagonal_upper(torch.empty(7, 5, device="meta", dtype=torch.bfloat16))
    assert [tuple(value.shape) for value in found] == [(7, 5), (5,), (5, 5)]
    assert {value.dtype for value in found} == {torch.float32}

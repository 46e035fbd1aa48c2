import pytest
import torch

from modelwright.maths.regression import nearest, shrunk


def test_what_is_off_the_diagonal_shrinks_and_the_rest_stays():
    moment = torch.tensor([[4.0, 2.0], [2.0, 9.0]])
    assert shrunk(moment, 0.5).tolist() == [[4.0, 1.0], [1.0, 9.0]]
    assert shrunk(moment, 0.1).tolist() == [[4.0, pytest.approx(0.2)], [pytest.approx(0.2), 9.0]]
    assert moment.tolist() == [[4.0, 2.0], [2.0, 9.0]]


def test_two_matrices_by_hand():
    # G1 = [[2, 1], [1, 2]] with W1 = (3, 0), G2 = I with W2 = (0, 3): Σ WG = (6, 3) + (0, 3) = (6, 6), Σ G = [[3, 1], [1, 3]]
    # with the inverse [[3, -1], [-1, 3]]/8: W = (12/8, 12/8).
    moments = [torch.tensor([[2.0, 1.0], [1.0, 2.0]]), torch.eye(2)]
    weights = [torch.tensor([[3.0, 0.0]]), torch.tensor([[0.0, 3.0]])]
    assert nearest(moments, [1, 1])(weights).tolist() == [pytest.approx([1.5, 1.5])]
    # Shares 1 and 2: Σ WG = (6, 3) + (0, 6) = (6, 9), Σ G = [[4, 1], [1, 4]] with the inverse [[4, -1], [-1, 4]]/15.
    assert nearest(moments, [1, 2])(weights).tolist() == [pytest.approx([1.0, 2.0])]


def test_inputs_that_are_no_more_than_rounding_keep_the_mean():
    # In the second input only the first moment has something, a thousandth of a millionth of the largest.
    moments = [torch.diag(torch.tensor([1.0, 1e-9])), torch.diag(torch.tensor([1.0, 0.0]))]
    found = nearest(moments, [1, 1])([torch.tensor([[2.0, 2.0]]), torch.tensor([[6.0, 6.0]])])
    assert found.tolist() == [pytest.approx([4.0, 4.0])]


def test_inputs_that_are_rare_still_decide():
    # A hundred-thousandth of the largest is more than rounding: the second input belongs to the first matrix.
    moments = [torch.diag(torch.tensor([1.0, 1e-5])), torch.diag(torch.tensor([1.0, 0.0]))]
    found = nearest(moments, [1, 1])([torch.tensor([[2.0, 2.0]]), torch.tensor([[6.0, 6.0]])])
    assert found.tolist() == [pytest.approx([4.0, 2.0])]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_dtype_is_the_weights(dtype):
    weights = [torch.ones(3, 2, dtype=dtype), torch.zeros(3, 2, dtype=dtype)]
    found = nearest([torch.eye(2), torch.eye(2)], [1, 1])(weights)
    assert found.dtype == dtype
    assert (found == 0.5).all()

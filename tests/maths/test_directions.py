import pytest
import torch

from modelwright.maths.directions import onto, principal


def test_the_principal_directions_of_a_case_by_hand():
    # Along (1, 1)/√2 the moment [[3, 1], [1, 3]] has energy 4, along (1, -1)/√2 energy 2.
    values, vectors = principal(torch.tensor([[3.0, 1.0], [1.0, 3.0]], dtype=torch.float64), 0.01)
    assert values.tolist() == pytest.approx([4, 2])
    assert vectors.abs().flatten().tolist() == pytest.approx([0.5**0.5] * 4)
    assert float(vectors[0, 0] * vectors[1, 0]) > 0


def test_what_lies_in_the_basis_stays_and_the_rest_goes():
    basis = torch.tensor([[0.6, 0.0], [0.8, 0.0], [0.0, 1.0]], dtype=torch.float64)
    x = torch.tensor([[3.0, 4.0, 7.0], [0.8, -0.6, 0.0], [1.0, 0.0, -1.0]])
    assert torch.allclose(onto(basis, x), torch.tensor([[3.0, 4.0, 7.0], [0.0, 0.0, 0.0], [0.36, 0.48, -1.0]]), atol=1e-7)
    assert onto(basis, x.bfloat16()).dtype == torch.bfloat16

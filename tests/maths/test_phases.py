import torch

from modelwright.maths import phases


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_a_matrix_of_two_rows_by_hand():
    # A = [[1, 2], [3, 4]]: U = (5 + i) / 2, W = (-3 + 5i) / 2.
    pair = phases.paired(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    assert pair.flatten().tolist() == [2.5 + 0.5j, -1.5 + 2.5j]
    assert phases.unpaired(pair).tolist() == [[1.0, 2.0], [3.0, 4.0]]


def test_the_pair_acts_as_the_matrix_and_turns_back_into_it():
    weight, x = normal(24, 40), normal(7, 40, seed=1)
    pair = phases.paired(weight)
    assert torch.allclose(phases.unpaired(pair), weight, atol=1e-5)
    z = torch.complex(x[:, :20], x[:, 20:])
    y = z @ pair[0].T + z.conj() @ pair[1].T
    assert torch.allclose(torch.cat([y.real, y.imag], 1), x @ weight.T, atol=1e-5)


def test_each_pair_of_entries_is_turned_and_divided_by_the_root_of_two():
    pair, quadrant = phases.paired(normal(24, 40)), normal(24, 40).view(2, 12, 2, 20).transpose(1, 2)
    for one, two, first, second in [
        (pair[0].real, pair[1].real, quadrant[0, 0], quadrant[1, 1]),
        (pair[1].imag, pair[0].imag, quadrant[0, 1], quadrant[1, 0]),
    ]:
        assert torch.allclose(one.square() + two.square(), (first.square() + second.square()) / 2, atol=1e-5)


def test_phases_by_hand():
    # 3 + i and -1 go to the real axis, with mean size 2; -4i and 1 + 2i to the imaginary one, with 3.
    values = torch.tensor([[3 + 1j, -1 + 0j], [0 - 4j, 1 + 2j]])
    found = phases.fit(values)
    assert found.codes.tolist() == [[0, 1], [3, 2]]
    assert found.scale.tolist() == [[2.0], [3.0]]
    assert torch.equal(phases.decode(found), torch.tensor([[2, -2], [-3j, 3j]], dtype=torch.complex64))
    by_row = phases.fit(values, by_row=True)
    assert by_row.scale.tolist() == [[2.0, 0.0], [0.0, 3.0]]
    assert torch.equal(phases.decode(by_row), phases.decode(found))


def test_all_codes_are_of_the_four_phases():
    found = phases.fit(phases.paired(normal(64, 64)))._replace(scale=torch.ones(2, 2, 1))
    assert set(phases.decode(found).flatten().tolist()) == {1, -1, 1j, -1j}


def test_scales_of_rows_lose_less_where_rows_differ():
    values = phases.paired(normal(32, 32) * torch.logspace(-1, 1, 32)[:, None])
    lost = [float((phases.decode(phases.fit(values, by_row)) - values).norm()) for by_row in (False, True)]
    assert lost[1] < 0.8 * lost[0]

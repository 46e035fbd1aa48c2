import pytest
import torch

from modelwright.maths import grids, phases, residual

NORMAL = torch.randn(512, 512, generator=torch.Generator().manual_seed(0))


def signs(rest):
    grid = grids.scaled(rest, "sign", None, "float32", rule="mean")
    return grid, grid.encode(rest)


def of_signs(term):
    grid, codes = term
    return grid.decode(codes)


def error(found, wanted=NORMAL):
    return float((found - wanted).square().mean() / wanted.square().mean())


def test_two_terms_by_hand():
    # 3 and 1: signs times 2 leave 1 and -1, which the second term is.
    found = residual.stack(torch.tensor([[3.0, 1.0]]), 2, signs, of_signs)
    assert [of_signs(term).tolist() for term in found] == [[[2.0, 2.0]], [[1.0, -1.0]]]
    assert residual.total(found, of_signs).tolist() == [[3.0, 1.0]]


def test_residual_signs_of_normal_numbers_lose_what_was_measured():
    found = residual.stack(NORMAL, 2, signs, of_signs)
    for count, lost in enumerate([0.3615, 0.130], 1):
        assert error(residual.total(found[:count], of_signs)) == pytest.approx(lost, rel=0.03)


def test_residual_phases_of_normal_numbers_lose_what_was_measured():
    found = residual.stack(phases.paired(NORMAL), 4, phases.fit, phases.decode)
    for count, lost in enumerate([0.363, 0.130, 0.058, 0.033], 1):
        assert error(phases.unpaired(residual.total(found[:count], phases.decode))) == pytest.approx(lost, rel=0.03)


@pytest.mark.parametrize("by_row", [False, True])
@pytest.mark.parametrize("values", [NORMAL[:16, :24], torch.zeros(4, 6), NORMAL[:8, :8] ** 5, torch.ones(4, 4), NORMAL[:8, :8] * 1e-9])
def test_no_term_leaves_more_than_it_was_given(values, by_row):
    rest = phases.paired(values)
    for term in residual.stack(rest, 5, lambda value: phases.fit(value, by_row), phases.decode):
        left = rest - phases.decode(term)
        assert left.norm() <= rest.norm() * (1 + 1e-6)
        rest = left


def test_fewer_terms_are_the_first_of_more():
    found, short = (residual.stack(phases.paired(NORMAL[:8, :8]), terms, phases.fit, phases.decode) for terms in (4, 2))
    for one, two in zip(short, found, strict=False):
        assert torch.equal(one.codes, two.codes)
        assert torch.equal(one.scale, two.scale)

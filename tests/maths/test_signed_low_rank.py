import pytest
import torch

from modelwright.core.errors import SiteError
from modelwright.maths import residual
from modelwright.maths.signed_low_rank import Signed, decode, fit


def uneven(rows=128, columns=256, seed=0):
    """Normal numbers in rows of different sizes."""
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * torch.linspace(0.2, 2, rows)[:, None]


def terms(values, count, rank, dtype=torch.float16):
    return residual.stack(values, count, lambda rest: fit(rest, rank, dtype), decode)


def lost(values, found):
    """‖R_t‖ / ‖W‖ after each term."""
    return (residual.left(values, found, decode).sqrt() / values.double().norm()).tolist()


def test_a_case_by_hand():
    # sizes [[2, 4], [1, 2]] are of rank 1, so that nothing is left; signs + - - +, the first in the highest bit: 1001 0000
    values = torch.tensor([[2.0, -4.0], [-1.0, 2.0]])
    term = fit(values, 1)
    assert term.signs.tolist() == [0b1001_0000]
    assert (term.left.shape, term.right.shape, term.left.dtype) == ((2, 1), (1, 2), torch.float16)
    assert torch.allclose(decode(term), values, atol=5e-3)
    # the largest singular value is 5: A and B share its root
    assert float(term.left.float().norm()) == pytest.approx(5**0.5, rel=1e-3)
    assert float(term.right.float().norm()) == pytest.approx(5**0.5, rel=1e-3)


def test_zero_counts_as_plus():
    term = fit(torch.tensor([[0.0, -1.0, 0.0, 2.0]]), 1)
    assert term.signs.tolist() == [0b1011_0000]
    assert torch.equal(decode(fit(torch.zeros(3, 5), 2)), torch.zeros(3, 5))


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (9, 7)])
@pytest.mark.parametrize("rank", [1, 3, 7])
def test_what_a_term_leaves_are_the_singular_values_of_the_sizes_that_it_drops(shape, rank):
    rest = uneven(*shape)
    for _ in range(4):
        dropped = torch.linalg.svdvals(rest.double().abs())[rank:]
        left = rest - decode(fit(rest, rank, torch.float32))
        assert float(left.double().norm()) ** 2 == pytest.approx(float(dropped.square().sum()), rel=1e-4)
        assert left.norm() < rest.norm() or rank == 7
        rest = left


@pytest.mark.parametrize("shape", [(16, 16), (12, 40), (40, 12)])
def test_at_full_rank_one_term_is_exact(shape):
    values = uneven(*shape)
    assert torch.allclose(decode(fit(values, min(shape), torch.float32)), values, atol=1e-5)


def test_rank_one_is_the_sign_times_scales_of_rows_and_columns():
    signs = torch.where(uneven(16, 24) < 0, -1.0, 1.0)
    rows = torch.linspace(0.5, 2, 16)[:, None]
    assert torch.allclose(decode(fit(signs * rows, 1, torch.float32)), signs * rows, atol=1e-5)  # as one bit with a scale for each row
    term = fit(uneven(16, 24), 1)
    assert (term.left > 0).all() == (term.right > 0).all()  # scales have one sign
    assert (term.left > 0).all() or (term.left < 0).all()


def test_normal_numbers_lose_what_was_measured():
    values = uneven()
    assert lost(values, terms(values, 4, 1)) == pytest.approx([0.60, 0.35, 0.24, 0.17], rel=0.04)
    first, *others = lost(values, terms(values, 4, 8))
    assert first == pytest.approx(0.53, rel=0.02)
    assert all(own <= most for own, most in zip(others, [0.29, 0.18, 0.12], strict=True))


def test_a_residual_of_the_factors_as_they_are_stored_loses_less_than_one_of_unrounded_ones():
    values = uneven(32, 48)
    ours = terms(values, 8, 4)
    rest, theirs = values, []
    for _ in range(8):
        exact = fit(rest, 4, torch.float32)
        theirs.append(Signed(exact.signs, exact.left.half(), exact.right.half()))
        rest = rest - decode(exact)
    assert lost(values, ours)[-1] < lost(values, theirs)[-1]


def test_a_power_of_four_on_the_values_is_one_of_two_on_the_factors():
    for one, other in zip(terms(uneven(24, 40), 3, 4), terms(uneven(24, 40) * 16, 3, 4), strict=True):
        assert torch.equal(one.signs, other.signs)
        for small, large in ((one.left, other.left), (one.right, other.right)):
            normal = small.abs() >= torch.finfo(torch.float16).tiny  # below it float16 has fewer digits
            assert torch.equal(small[normal] * 4, large[normal])
            assert torch.allclose(small.float() * 4, large.float(), atol=2.0**-22, rtol=0)


def test_in_equal_bytes_it_loses_less_than_a_plain_product():
    values = uneven(128, 128)
    term = fit(values, 4)
    nbytes = sum(part.nbytes for part in term)
    rank = nbytes // (2 * (128 + 128))  # of two factors in float16
    dropped = torch.linalg.svdvals(values)[rank:].square().sum().sqrt() / values.norm()
    assert lost(values, [term])[0] < 0.7 * float(dropped)


def test_factors_too_large_for_their_dtype_are_refused():
    with pytest.raises(SiteError, match=r"too large for float16.*skip"):
        fit(torch.full((4, 4), 1e10), 1)
    with pytest.raises(SiteError, match="NaN or infinite"):
        fit(torch.tensor([[torch.nan, 1.0]]), 1)


def test_all_reach_a_level_before_any_reaches_the_next():
    harm = torch.tensor([[3.0, 1.0, 2.0], [5.0, 5.0, 4.0]])
    assert residual.universal_order(harm).tolist() == [[2, 0, 1], [4, 5, 3]]


def test_a_harm_that_is_not_finite_is_the_next_levels_and_the_most_of_its_own():
    nan = float("nan")
    # first level: 2 + 9 = 11 is more than 10 and less than 12; second level: the most, 9, of equals the first goes first
    assert residual.universal_order(torch.tensor([[12.0, nan, 10.0], [1.0, 2.0, 3.0]])).tolist() == [[1, 2, 0], [3, 4, 5]]
    assert residual.universal_order(torch.tensor([[1.0, nan, 9.0], [1.0, 2.0, 3.0]])).tolist() == [[0, 2, 1], [3, 4, 5]]
    assert residual.universal_order(torch.tensor([[nan, 7.0, 9.0]])).tolist() == [[1, 0, 2]]
    assert residual.universal_order(torch.full((2, 2), nan)).tolist() == [[0, 1], [2, 3]]
    assert residual.universal_order(torch.zeros(0, 3)).shape == (0, 3)


def test_what_is_left_is_told_after_each_term():
    found = terms(uneven(8, 8), 3, 2)
    whole = uneven(8, 8) - residual.total(found, decode)
    assert float(residual.left(uneven(8, 8), found, decode)[-1]) == pytest.approx(float(whole.norm()) ** 2, rel=1e-4)

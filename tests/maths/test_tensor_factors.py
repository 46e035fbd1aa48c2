from math import prod

import pytest
import torch

from modelwright.maths.tensor_factors import (
    contract,
    decomposed,
    folded,
    leading,
    multiplications,
    ranks_for,
    rebuilt,
    shapes_of,
    size_of,
    sizes_of,
    spread,
    terms,
    unfolded,
)

FORMS = ("cp", "tucker", "tt")


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def drawn(form, shape, ranks, fixed=(), dtype=torch.float64):
    return [normal(*size, seed=n, dtype=dtype) for n, size in enumerate(shapes_of(form, shape, ranks, fixed))]


def test_ranks_by_hand():
    # 24 · 24 · 24 = 13,824 entries. cp: 0.5 · 13,824 / 72 = 96.
    assert ranks_for("cp", (24, 24, 24), 0.5) == (96,)
    # tucker, all 24 c: 13,824 c³ + 1,728 c = 6,912 has the root c = 0.739, and 24 c = 17.7; 18³ + 3 · 24 · 18 = 7,128 is too much.
    assert ranks_for("tucker", (24, 24, 24), 0.5) == (17, 17, 17)
    # with the kernel fixed: 9 · 16² c² + 2 · 16² c = 1,152 has the root 0.6047, and 16 c = 9.7.
    assert ranks_for("tucker", (16, 9, 16), 0.5, fixed=(1,)) == (9, 9, 9)
    # tt: 24 R + 24 R² + 24 R = 6,912 has the root 16.0.
    assert ranks_for("tt", (24, 24, 24), 0.5) == (16, 16)


@pytest.mark.parametrize("keep", [0.05, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("shape", [(24, 24, 24), (64, 9, 48), (8, 12, 10, 6)])
@pytest.mark.parametrize("form", FORMS)
def test_the_parts_hold_the_share_and_no_more(form, shape, keep):
    for fixed in ((), (1,)) if form == "tucker" else ((),):
        ranks = ranks_for(form, shape, keep, fixed)
        held = size_of(form, shape, ranks, fixed) / prod(shape)
        assert held <= keep
        if form != "tt" or keep < 1:
            assert held > 0.6 * keep


def test_the_smallest_ranks_are_one():
    assert [ranks_for(form, (8, 8, 8), 0.0) for form in FORMS] == [(1,), (1, 1, 1), (1, 1)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize("form", FORMS)
def test_parts_are_summed_as_their_einsum_says(form, dtype):
    ranks = {"cp": (3,), "tucker": (2, 3, 4), "tt": (2, 3)}[form]
    parts = drawn(form, (4, 5, 6), ranks, dtype=dtype)
    equation = {"cp": "ar,br,cr->abc", "tucker": "xyz,ax,by,cz->abc", "tt": "uax,xby,ycv->abc"}[form]
    assert torch.allclose(rebuilt(form, parts), torch.einsum(equation, *parts))


def test_a_core_keeps_its_fixed_ways():
    core, one, two = drawn("tucker", (4, 5, 6), (2, 5, 3), fixed=(1,))
    assert core.shape == (2, 5, 3)
    assert torch.allclose(rebuilt("tucker", [core, one, two], (1,)), torch.einsum("xbz,ax,cz->abc", core, one, two))


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
def test_full_rank_tucker_gives_the_tensor_back(dtype):
    for shape in ((6, 7, 8), (40, 2, 3)):  # the second has ranks above the product of the others
        tensor = normal(*shape, dtype=dtype)
        for iterations in (0, 3):
            parts = decomposed("tucker", tensor, shape, iterations=iterations)
            assert (rebuilt("tucker", parts) - tensor).abs().max() < 1e-5
            assert parts[0].dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
def test_a_full_train_gives_the_tensor_back(dtype):
    tensor = normal(6, 7, 8, dtype=dtype)
    assert (rebuilt("tt", decomposed("tt", tensor, (6, 8))) - tensor).abs().max() < 1e-5


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize("form", FORMS)
def test_a_tensor_of_the_ranks_is_found(form, dtype):
    ranks = {"cp": (3,), "tucker": (2, 3, 2), "tt": (2, 3)}[form]
    tensor = rebuilt(form, drawn(form, (8, 9, 7), ranks, dtype=dtype))
    parts = decomposed(form, tensor, ranks, iterations=500)
    tolerance = 1e-3 if form == "cp" else 1e-10
    assert (rebuilt(form, parts) - tensor).norm() <= tolerance * tensor.norm()
    assert [part.shape for part in parts] == [torch.Size(size) for size in shapes_of(form, (8, 9, 7), ranks)]


def test_hosvd_drops_at_most_the_tails_and_hooi_no_more():
    tensor, ranks = normal(8, 9, 7, dtype=torch.float64), (4, 5, 3)
    tails = sum(torch.linalg.svdvals(unfolded(tensor, n))[rank:].square().sum() for n, rank in enumerate(ranks))
    first = (rebuilt("tucker", decomposed("tucker", tensor, ranks, iterations=0)) - tensor).square().sum()
    later = (rebuilt("tucker", decomposed("tucker", tensor, ranks, iterations=50)) - tensor).square().sum()
    assert later < first <= tails


def test_a_train_drops_at_most_the_tails_of_its_unfoldings():
    tensor, ranks = normal(8, 9, 7, dtype=torch.float64), (4, 5)
    tails = sum(torch.linalg.svdvals(tensor.reshape(prod(tensor.shape[: n + 1]), -1))[rank:].square().sum() for n, rank in enumerate(ranks))
    assert (rebuilt("tt", decomposed("tt", tensor, ranks)) - tensor).square().sum() <= tails


def test_alternating_least_squares_never_grow_the_error():
    tensor = normal(8, 9, 7)
    errors = [float((rebuilt("cp", decomposed("cp", tensor, (12,), iterations=n)) - tensor).norm()) for n in (1, 2, 4, 8, 16, 32)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.9 * errors[0]


def test_cp_of_a_matrix_is_its_singular_values():
    tensor = normal(10, 8, dtype=torch.float64)
    parts = decomposed("cp", tensor, (3,), iterations=500)
    dropped = torch.linalg.svdvals(tensor)[3:].square().sum()
    assert (rebuilt("cp", parts) - tensor).square().sum() == pytest.approx(float(dropped), rel=1e-4)


def test_the_factors_of_cp_share_the_size():
    parts = decomposed("cp", 100 * normal(6, 7, 8), (4,))
    sizes = [part.norm(dim=0) for part in parts]
    assert all(torch.allclose(each, sizes[0], rtol=1e-3) for each in sizes)


@pytest.mark.parametrize("form", FORMS)
def test_parts_drawn_with_the_spread_give_the_deviation(form):
    shape, ranks = (12, 10, 8), {"cp": (9,), "tucker": (5, 4, 6), "tt": (7, 6)}[form]
    each = spread(form, shape, ranks, 0.3)
    rng = torch.Generator().manual_seed(0)
    sizes = shapes_of(form, shape, ranks)
    drawn = [rebuilt(form, [each * torch.randn(size, generator=rng) for size in sizes]) for _ in range(400)]
    assert torch.stack(drawn).square().mean().sqrt() == pytest.approx(0.3, rel=0.1)


def test_the_spread_of_a_train_has_the_root_of_its_ranks():
    # σ = 1, ranks 3 and 5: s = (1 / √15)^(1/3). Without the root W would have the deviation 1 / √15 = 0.26.
    assert spread("tt", (8, 8, 8), (3, 5), 1.0) == pytest.approx(15 ** (-1 / 6))
    assert spread("cp", (8, 8, 8), (4,), 2.0) == pytest.approx((2 / 4**0.5) ** (1 / 3))
    assert spread("tucker", (8, 8, 8), (2, 3, 4), 2.0) == pytest.approx((2 / 24**0.5) ** (1 / 4))
    assert spread("tucker", (8, 9, 8), (2, 9, 4), 2.0, fixed=(1,)) == pytest.approx((2 / 8**0.5) ** (1 / 3))


def test_contracting_with_inputs_makes_fewer_products_than_rebuilding():
    letters = ["zabc", *terms("tucker", ["af", "bg", "ch"])]
    parts = [normal(2, 2, 2), *(normal(8, 8, 2, seed=n) for n in range(3))]
    inputs = normal(1, 8, 8, 8)
    found = contract(letters, [inputs, *parts], "zfgh")
    assert torch.allclose(found, torch.einsum(",".join(letters) + "->zfgh", inputs, *parts), atol=1e-4)
    sizes = sizes_of(letters, [inputs, *parts])
    assert sizes["A"] == 2
    assert multiplications(letters, sizes, "zfgh") < 8**6 // 7
    assert multiplications(["ab", "bc", "cd"], {"a": 1, "b": 10, "c": 10, "d": 10}, "ad") == 200


def test_leading_columns_are_orthonormal_and_hold_most():
    for matrix in (normal(5, 20, dtype=torch.float64), normal(20, 5, dtype=torch.float64)):
        basis = leading(matrix, 3)
        assert torch.allclose(basis.T @ basis, torch.eye(3, dtype=torch.float64), atol=1e-10)
        kept = torch.linalg.svdvals(matrix)[:3].square().sum()
        assert float((basis.T @ matrix).square().sum()) == pytest.approx(float(kept))


@pytest.mark.parametrize(
    ("size", "parts", "found"), [(512, 3, (8, 8, 8)), (64, 2, (8, 8)), (97, 3, (5, 5, 4)), (7, 1, (7,)), (1, 3, (1, 1, 1))]
)
def test_a_size_is_folded_into_numbers_near_each_other(size, parts, found):
    assert folded(size, parts) == found


@pytest.mark.parametrize("parts", [2, 3, 4, 8])
def test_what_is_folded_loses_nothing_and_pads_little(parts):
    for size in (*range(1, 300), 32000, 50257, 151936):
        product = prod(folded(size, parts))
        assert size <= product
        assert product <= (1.43 if size < 300 else 1.1) * size

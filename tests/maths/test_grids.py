import pytest
import torch

from modelwright.maths import grids, rounding, scales
from modelwright.maths.levels import k_means, levels, named

NORMAL = torch.randn(512, 1024, generator=torch.Generator().manual_seed(0))
# Relative mean square errors on independent normal weights that were measured with other code.
MEASURED = {
    "integers of 32": (grids.affine(NORMAL, 4, 32), 0.00901),
    "integers of 32 with zero points": (grids.affine(NORMAL, 4, 32, symmetric=False), 0.00653),
    "8-bit integers of 256": (grids.affine(NORMAL, 8, 256), 4.8e-5),
    "NF4 of 32": (grids.scaled(NORMAL, "nf4", 32, "float32"), 0.00763),
    "NF4 of 64": (grids.scaled(NORMAL, "nf4", 64, "float32"), 0.00846),
    "NF4 of 64, nested": (grids.scaled(NORMAL, "nf4", 64, "nested"), 0.00846),
    "MXFP4, rounded down": (grids.scaled(NORMAL, "e2m1", 32, "e8m0"), 0.01322),
    "MXFP4": (grids.scaled(NORMAL, "e2m1", 32, "e8m0", doubling=True), 0.01253),
    "NVFP4": (grids.scaled(NORMAL, "e2m1", 16, "e4m3"), 0.00906),
    "signs": (grids.scaled(NORMAL, "sign", None, "float32", rule="mean"), 0.3615),
    "ternary": (grids.scaled(NORMAL, "ternary", None, "float32", rule="mean"), 0.262),
}  # fmt: skip
EVERY = [(name, form) for name in ("nf4", "e2m1", "sign", "ternary", "odd", "k-means") for form in scales.FORMS]


def error(grid, weight=NORMAL):
    return float((grids.nearest(weight, grid) - weight).square().mean() / weight.square().mean())


@pytest.mark.parametrize("name", MEASURED)
def test_errors_on_normal_weights_are_those_that_are_known(name):
    grid, known = MEASURED[name]
    assert error(grid) == pytest.approx(known, rel=0.03)


def test_nf4_has_the_published_levels_to_the_bit():
    published = [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
                 -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
                 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0]  # fmt: skip
    assert named("nf4").values.tolist() == published


def test_ties_of_4_bit_floats_go_to_the_even_mantissa():
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    assert named("e2m1").snap(ties).tolist() == [0, 1, 1, 2, 2, 4, 4]
    assert named("e2m1").snap(-ties).tolist() == [0, -1, -1, -2, -2, -4, -4]
    assert named("e2m1").snap(torch.tensor([7.0, -70.0])).tolist() == [6, -6]
    assert named("e2m1").encode(torch.tensor([0.0, 3.0, -3.0, -0.1])).tolist() == [0, 5, 13, 0]


def test_odd_levels_of_one_bit_are_signs_and_zero_counts_as_positive():
    assert named("odd", 1).values.tolist() == [-1, 1]
    assert named("odd", 3).values.tolist() == [-7, -5, -3, -1, 1, 3, 5, 7]
    assert named("sign").snap(torch.tensor([0.0, -1e-30, 4.0])).tolist() == [1, -1, 1]


def test_the_dynamic_map_has_256_levels_from_zero_to_one():
    table = scales.dynamic_map().values
    assert len(table.unique()) == 256
    assert table.max() == 1
    assert (table == 0).sum() == 1
    assert table[table > 0].min() == pytest.approx(0.55e-6)  # the middle of 0.1 and 1, six decades down
    assert (table > 0).sum() == 128


def test_k_means_of_many_numbers_sees_all_columns():
    weight = torch.randn(1024, 512, generator=torch.Generator().manual_seed(0))
    weight[:, ::2] *= 20  # every so many numbers would be of these alone
    table = k_means(weight, 4)
    apart = (table.decode(table.encode(weight)) - weight)[:, 1::2]
    assert apart.norm() < 0.7 * weight[:, 1::2].norm()


def test_k_means_finds_separate_values_and_its_levels_are_the_means_of_what_is_nearest():
    assert k_means(torch.tensor([-3.0, 1.0, 2.0, 9.0]).repeat(50), 2).values.tolist() == [-3, 1, 2, 9]
    found = k_means(NORMAL, 3)
    codes = found.encode(NORMAL)
    means = torch.stack([NORMAL[codes == code].mean() for code in range(8)])
    assert torch.allclose(found.values, means, atol=0.01)
    for bits, known in ((2, 0.1185), (3, 0.0317), (4, 0.00768)):  # the levels stand on the weights over their groups' sizes
        assert error(grids.scaled(NORMAL, "k-means", 64, "own", bits=bits)) == pytest.approx(known, rel=0.05)
    assert (grids.nearest(torch.zeros(4, 64), grids.scaled(torch.zeros(4, 64), "k-means", 64, "own")) == 0).all()


@pytest.mark.parametrize("size", [1e-3, 1e-4])
def test_small_weights_in_float16_lose_no_more_than_in_float32(size):
    for make in (lambda weight: grids.affine(weight, 8, None), lambda weight: grids.affine(weight, 4, 128)):
        lost = [error(make((NORMAL * size).to(dtype)), (NORMAL * size).to(dtype).float()) for dtype in (torch.float16, torch.float32)]
        assert lost[0] < 1.2 * lost[1] + 2e-4  # scales of so few bits round a little themselves


@pytest.mark.parametrize(("name", "form"), EVERY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_twice_changes_nothing_and_groups_of_zeros_stay_zero(name, form, dtype):
    weight = NORMAL[:8, :128].to(dtype).clone()
    weight[1] = 0
    weight[2, :64] = 0
    grid = grids.scaled(weight, name, 32, form, bits=3)
    once = grids.nearest(weight, grid)
    assert once.isfinite().all()
    assert torch.equal(grids.nearest(once, grid), once)
    if 0 in grid.table.values:
        assert (once[1] == 0).all()
    else:  # where no level is zero, what comes of zeros is at most a scale
        assert (once[1].abs() <= grid.scale[1].max() * grid.table.largest).all()


@pytest.mark.parametrize(("name", "form"), EVERY)
def test_one_column_at_a_time_is_the_same_as_all_at_once(name, form):
    weight = NORMAL[:16, :96]
    grid = grids.scaled(weight, name, 32, form, bits=3)
    whole = grids.nearest(weight, grid)
    for column in range(96):
        assert torch.equal(grid.near(column // 32)(weight[:, column]), whole[:, column])


def test_mxfp4_holds_powers_of_two_exactly_and_only_scales_move_with_them():
    powers = torch.tensor([[1.0, 2.0, -4.0, 0.5, 6.0, 3.0, 1.5, 0.0] * 4])
    for by in (1.0, 2.0**-20, 2.0**30):
        grid = grids.scaled(powers * by, "e2m1", 32, "e8m0")
        assert torch.equal(grids.nearest(powers * by, grid), powers * by)
    small, large = grids.scaled(NORMAL, "e2m1", 32, "e8m0"), grids.scaled(NORMAL * 8, "e2m1", 32, "e8m0")
    assert torch.equal(small.encode(NORMAL), large.encode(NORMAL * 8))
    assert torch.equal(small.stored["weight_scale"] + 3, large.stored["weight_scale"])


@pytest.mark.parametrize(("largest", "floor", "doubled"), [(6.0, 0, 0), (6.9, 0, 0), (7.0, 0, 1), (7.9, 0, 1), (8.0, 1, 1), (4.0, 0, 0)])
def test_the_power_of_two_of_a_group_by_hand(largest, floor, doubled):
    # OCP: 2^(⌊log2 largest⌋ - 2); the other rule goes up where the mantissa is 1.75 or more, as 7 = 1.75 · 4 has.
    weight = torch.full((1, 32), largest)
    assert grids.scaled(weight, "e2m1", 32, "e8m0").scale.item() == 2.0**floor
    assert grids.scaled(weight, "e2m1", 32, "e8m0", doubling=True).scale.item() == 2.0**doubled


def test_nvfp4_scales_use_the_whole_range_of_their_8_bits_whatever_the_size_of_the_matrix():
    grid = grids.scaled(NORMAL, "e2m1", 16, "e4m3")
    assert grid.stored["weight_scale"].float().max() == scales.LARGEST
    assert grid.stored["weight_global_scale"].item() == pytest.approx(448 * 6 / NORMAL.abs().max().item())
    other = grids.scaled(NORMAL * 1e-3, "e2m1", 16, "e4m3")
    assert (other.encode(NORMAL * 1e-3) != grid.encode(NORMAL)).float().mean() < 1e-3


def test_a_nested_scale_is_its_code_times_its_blocks_size_plus_the_mean():
    scale = torch.tensor([[0.5, 1.5, 1.0, 1.25]])  # mean 1.0625, largest distance from it 0.5625, of which the rest are shares
    stored = scales.store(scale, "nested", torch.float32)
    assert stored["nested_offset"] == 1.0625
    assert stored["nested_scale"].tolist() == [0.5625]
    table = scales.dynamic_map()
    shares = (scale - 1.0625) / 0.5625
    assert torch.equal(scales.read(stored, "nested"), table.snap(shares) * 0.5625 + 1.0625)
    assert torch.allclose(scales.read(stored, "nested"), scale, atol=0.02)


@pytest.mark.parametrize("form", scales.FORMS)
def test_empty_scales_are_like_stored_ones(form):
    stored = scales.store(torch.rand(6, 100) + 0.1, form, torch.bfloat16)
    empty = scales.empty(form, 6, 100, torch.bfloat16, "meta")
    assert {name: (value.shape, value.dtype) for name, value in stored.items()} == {
        name: (value.shape, value.dtype) for name, value in empty.items()
    }


def test_a_search_makes_no_group_worse_by_its_own_measure():
    for grid, other in (
        (grids.scaled(NORMAL, "nf4", 64, "own"), grids.scaled(NORMAL, "nf4", 64, "own", search=True)),
        (grids.affine(NORMAL, 3, 64), grids.affine(NORMAL, 3, 64, search=True)),
    ):
        plain, searched = (
            (grids.nearest(NORMAL, one) - NORMAL).abs().pow(rounding.NORM).view(512, -1, 64).sum(-1) for one in (grid, other)
        )
        assert (searched <= plain + 1e-4).all()
        assert searched.sum() < 0.95 * plain.sum()


def test_levels_may_stand_in_any_order():
    table = levels(torch.tensor([5.0, -1.0, 2.0]))
    assert table.encode(torch.tensor([1.9, -7.0, 4.0])).tolist() == [2, 1, 0]
    assert table.bits == 2


@pytest.mark.parametrize("zeros", ["none", "whole", "float"])
def test_a_column_of_integers_is_rounded_as_the_matrix_also_where_it_lies_outside_the_range(zeros):
    weight = NORMAL[:16, :96]
    if zeros == "float":
        grid = grids.Affine(*rounding.half_quadratic(weight, 3, 32), 3)
        assert (grid.zero != grid.zero.round()).any()
    else:
        grid = grids.affine(weight, 3, 32, symmetric=zeros == "none")
    far = weight * 1.7  # as the errors of other columns make it
    whole = grids.nearest(far, grid)
    assert (grid.encode(far).view(16, 3, 32)[:, 1] == 3).any()
    assert (grid.encode(far).view(16, 3, 32)[:, 1] == -4).any()
    for column in range(32, 64):
        assert torch.allclose(grid.near(1)(far[:, column]), whole[:, column], rtol=1e-5, atol=1e-6)

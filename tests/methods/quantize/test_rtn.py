import pytest
import torch
from calibration import blocks_of, normal
from hypothesis import given, settings
from hypothesis import strategies as some
from tiny import tiny

import modelwright as mw
from modelwright.blocks.packed import PackedLinear
from modelwright.maths.rounding import encode
from modelwright.methods.quantize.rtn import Rtn

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def error(weight, **settings):
    return ((Rtn(**settings).tensor(weight).dense() - weight) ** 2).mean().item() / (weight**2).mean().item()


def step(layer):
    """The scale of each weight, float32 [out, in]."""
    return layer.weight_scale.float().repeat_interleave(layer.in_features // layer.weight_scale.shape[1], 1)


def test_a_case_by_hand():
    # Groups of 4; 4 bits reach from -8 to 7. First: max|w| 7.5, scale 7.5/7.5 = 1: 7.5 → 8, clipped to 7; 2.5 → 2 (to
    # even). Second: max|w| 15, scale 2: -15/2 = -7.5 → -8 → -16; 5/2 = 2.5 → 2 → 4; 7/2 = 3.5 → 4 → 8; 0.9/2 → 0.
    weight = torch.tensor([[7.5, -3.2, 2.5, 0.4, -15.0, 5.0, 7.0, 0.9]])
    layer = Rtn(bits=4, group=4).tensor(weight)
    assert layer.weight_scale.tolist() == [[1.0, 2.0]]
    assert layer.codes().tolist() == [[7, -3, 2, 0, -8, 2, 4, 0]]
    assert layer.dense().tolist() == [[7.0, -3.0, 2.0, 0.0, -16.0, 4.0, 8.0, 0.0]]


def test_an_asymmetric_case_by_hand():
    # From -1 to 14 in 15 steps: scale 1, zero point 1 of 0..15, which is stored as 1 - 8 = -7. 2.4 → 2, -0.6 → -1.
    layer = Rtn(bits=4, group=0, symmetric=False).tensor(torch.tensor([[-1.0, 14.0, 2.4, -0.6]]))
    assert layer.zero().tolist() == [[-7]]
    assert layer.dense().tolist() == [[-1.0, 14.0, 2.0, -1.0]]


@pytest.mark.parametrize(
    ("settings_", "expected"),
    [
        ({"bits": 4, "group": 32}, 0.00901),
        ({"bits": 4, "group": 32, "symmetric": False}, 0.00653),
        ({"bits": 8, "group": 0}, 4.8e-5),
    ],
)
def test_the_error_on_normal_weights_is_the_known_one(settings_, expected):
    assert error(normal(1024, 256), **settings_) == pytest.approx(expected, rel=0.03)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    rows=some.integers(1, 6),
    groups=some.integers(1, 4),
    bits=some.integers(2, 8),
    symmetric=some.booleans(),
    dtype=some.sampled_from(sorted(DTYPES)),
    size=some.floats(-3, 3),
    seed=some.integers(0, 99),
)
def test_any_weight_lands_within_half_a_step_and_a_second_time_on_itself(rows, groups, bits, symmetric, dtype, size, seed):
    weight = (normal(rows, 8 * groups, seed=seed) * 10**size).to(DTYPES[dtype])
    weight[:, ::3] = 0
    weight[0] = 0
    layer = Rtn(bits=bits, group=8, symmetric=symmetric).tensor(weight)
    codes, scale, dense = layer.codes(), layer.weight_scale, layer.dense()
    assert scale.dtype == dense.dtype == DTYPES[dtype]
    assert (scale > 0).all()
    assert (dense[weight == 0] == 0).all()
    exact = (codes.float() - (0 if symmetric else layer.zero().float().repeat_interleave(8, 1))) * step(layer)
    inside = (codes > -(2 ** (bits - 1))) & (codes < 2 ** (bits - 1) - 1)
    assert ((exact - weight.float()).abs() <= 0.50001 * step(layer))[inside].all()
    assert ((exact - weight.float()).abs() <= 1.01 * step(layer))[~inside].all()  # the clipped ones
    assert torch.equal(encode(exact, scale, layer.zero(), bits), codes)


def test_of_a_symmetric_grid_only_the_greatest_weight_errs_by_half_a_step():
    weight = normal(16, 64).abs()
    layer = Rtn(bits=4, group=0).tensor(weight)
    clipped = weight / step(layer) > 7.5 - 1e-5
    assert torch.equal(clipped, weight == weight.amax(1, keepdim=True))
    assert torch.allclose((layer.dense() - weight)[clipped], -0.5 * step(layer)[clipped], atol=1e-5)


@pytest.mark.parametrize("symmetric", [True, False])
def test_rows_of_zeros_and_of_one_value_are_kept(symmetric):
    weight = torch.tensor([[0.0] * 8, [0.5] * 8, [-2.0] * 8, [1e-7] * 8])
    result = Rtn(group=0, symmetric=symmetric).tensor(weight).dense()
    assert (result[0] == 0).all()
    assert torch.allclose(result, weight, rtol=0.07)


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_error_falls_with_every_bit_and_with_the_group(symmetric):
    weight = normal(64, 256)
    by_bits = [error(weight, bits=bits, group=64, symmetric=symmetric) for bits in range(2, 9)]
    by_group = [error(weight, bits=4, group=group, symmetric=symmetric) for group in (16, 32, 64, 128, 0)]
    assert by_bits == sorted(by_bits, reverse=True)
    assert by_group == sorted(by_group)


def test_codes_are_chosen_with_the_scale_that_is_stored():
    weight = normal(64, 256).bfloat16()
    layer = Rtn(bits=8, group=0).tensor(weight)
    exact = weight.float().abs().amax(1, keepdim=True) / 127.5
    assert not torch.equal(layer.weight_scale.float(), exact)
    assert torch.equal(layer.codes(), (weight.float() / layer.weight_scale.float()).round().clamp(-128, 127).to(torch.int8))
    assert not torch.equal(layer.codes(), (weight.float() / exact).round().clamp(-128, 127).to(torch.int8))


def test_the_search_lowers_its_error():
    weight = normal(32, 128) ** 3
    plain, searched = (
        (Rtn(bits=3, group=64, search=search).tensor(weight).dense() - weight).abs().pow(2.4).view(32, 2, 64).sum(-1)
        for search in (False, True)
    )
    assert (searched <= plain).all()
    assert searched.sum() < 0.95 * plain.sum()


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_a_weight_takes_its_bits_and_its_share_of_a_scale(bits):
    layer = Rtn(bits=bits, group=64).tensor(normal(128, 256).bfloat16())
    shape = layer.weight_shape.nbytes
    assert 8 * (layer.stored_bytes() - shape) == (bits + 16 / 64) * 128 * 256
    layer = Rtn(bits=bits, group=64, symmetric=False).tensor(normal(128, 256).bfloat16())
    assert 8 * (layer.stored_bytes() - shape) == (bits + (16 + bits) / 64) * 128 * 256


@pytest.mark.parametrize(("columns", "groups"), [(160, 5), (96, 3), (100, 1), (36, 1)])
def test_a_group_that_does_not_divide_a_row_is_lowered_or_the_whole_row(columns, groups):
    # The common divisors with 128 are 32, 32, and twice 4, which is too small.
    layer = Rtn(group=128).tensor(normal(4, columns))
    assert layer.weight_scale.shape == (4, groups)
    assert layer.stored_bytes() == Rtn(group=128).planned(torch.empty(4, columns, device="meta")).stored_bytes()


def test_every_matrix_of_the_blocks_is_packed_and_nothing_else_changes():
    before, model = tiny(), mw.open(tiny())
    matrices = dict(blocks_of(mw.open(before)))
    mw.apply(model, Rtn(bits=4, group=32))
    for name, weight in matrices.items():
        layer = model.module.get_submodule(name.removesuffix(".weight"))
        assert isinstance(layer, PackedLinear), name
        assert torch.equal(layer.dense(), Rtn(bits=4, group=32).tensor(weight).dense())
    for name, weight in before.named_parameters():
        if name not in matrices:  # embedding, head and norms
            assert torch.equal(model.module.get_parameter(name), weight), name


def test_a_matrix_that_is_stored_the_other_way_is_grouped_along_its_inputs():
    model = tiny("gpt2")
    weight = model.transformer.h[0].mlp.c_fc.weight.detach().T.clone()
    bias = model.transformer.h[0].mlp.c_fc.bias
    mw.apply(model, Rtn(group=32))
    layer = model.transformer.h[0].mlp.c_fc
    assert layer.bias is bias
    assert torch.equal(layer.dense(), Rtn(group=32).tensor(weight).dense())

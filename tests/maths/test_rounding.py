from functools import partial

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from torch import nn

from modelwright.maths import rounding
from modelwright.maths.rounding import decode, encode, pack, packed_words, scales, unpack


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rounded(weight, bits, group=None, **options):
    scale, zero = scales(weight, bits, group, **options)
    return decode(encode(weight, scale, zero, bits), scale, zero)


def error(weight, bits, group=None, **options):
    return ((rounded(weight, bits, group, **options) - weight) ** 2).mean().item() / (weight**2).mean().item()


def test_a_symmetric_case_by_hand():
    weight = torch.tensor([[7.5, -7.5, 3.4, 0.5, 1.5, 0.0]])
    scale, zero = scales(weight, 4)
    assert scale.tolist() == [[1.0]]
    assert zero is None
    assert encode(weight, scale, zero, 4).tolist() == [[7, -8, 3, 0, 2, 0]]


def test_an_asymmetric_case_by_hand():
    weight = torch.tensor([[-1.0, 14.0, 2.4, 0.0], [3.0, 6.0, 15.0, 9.2]])
    scale, zero = scales(weight, 4, symmetric=False)
    assert scale.tolist() == [[1.0], [1.0]]
    assert zero.tolist() == [[-7], [-8]]
    codes = encode(weight, scale, zero, 4)
    assert codes.tolist() == [[-8, 7, -5, -7], [-5, -2, 7, 1]]
    assert decode(codes, scale, zero).tolist() == [[-1.0, 14.0, 2.0, 0.0], [3.0, 6.0, 15.0, 9.0]]


@pytest.mark.parametrize(
    ("bits", "group", "symmetric", "expected"),
    [(4, 32, True, 0.00901), (4, 32, False, 0.00653), (8, 256, True, 4.8e-5)],
)
def test_the_error_on_normal_weights_is_the_known_one(bits, group, symmetric, expected):
    assert error(normal(512, 1024), bits, group, symmetric=symmetric) == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
def test_rounding_twice_changes_nothing_and_errs_by_half_a_step(bits, dtype, symmetric):
    weight = normal(32, 96).to(dtype)
    scale, zero = scales(weight, bits, 32, symmetric=symmetric)
    assert scale.dtype == dtype
    codes = encode(weight, scale, zero, bits)
    again = decode(codes, scale, zero)
    assert again.dtype == dtype
    # bfloat16 has 8 bits of precision, so 255 steps above the zero point it errs by more than half a step.
    if not (dtype == torch.bfloat16 and bits == 8 and not symmetric):
        assert torch.equal(encode(again, scale, zero, bits), codes)
    inside = (codes > -(2 ** (bits - 1))) & (codes < 2 ** (bits - 1) - 1)
    exact = decode(codes, scale.float(), zero)
    step = scale.float().repeat_interleave(32, 1)
    assert ((exact - weight.float()).abs() <= step * 0.50001)[inside].all()


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_error_falls_with_the_bits(symmetric):
    errors = [error(normal(64, 64), bits, 32, symmetric=symmetric) for bits in range(2, 9)]
    assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_zeros_and_constant_rows_are_kept(dtype, symmetric):
    weight = torch.tensor([[0.0] * 8, [0.5] * 8, [-2.0] * 8, [1e-7] * 8, [0.0, 1, 2, 3, 0, -1, 0, 0]]).to(dtype)
    assert (scales(weight, 4, 4, symmetric=symmetric)[0] > 0).all()
    result = rounded(weight, 4, 4, symmetric=symmetric)
    assert (result[weight == 0] == 0).all()
    assert torch.isfinite(result).all()
    assert torch.allclose(result[1:3].float(), weight[1:3].float(), rtol=0.07)


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_clip_search_lowers_its_error(symmetric):
    weight = normal(64, 128) ** 3
    plain = (rounded(weight, 3, 64, symmetric=symmetric) - weight).abs().pow(2.4).view(64, 2, 64).sum(-1)
    searched = (rounded(weight, 3, 64, symmetric=symmetric, mse=True) - weight).abs().pow(2.4).view(64, 2, 64).sum(-1)
    assert (searched <= plain).all()
    assert searched.sum() < 0.95 * plain.sum()


def test_the_stored_scale_decides_the_codes():
    weight = normal(64, 64).bfloat16()
    scale, _ = scales(weight, 8, None)
    codes = encode(weight, scale, None, 8)
    assert torch.equal(codes, (weight.float() / scale.float()).round().clamp(-128, 127).to(torch.int8))


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("columns", [1, 7, 8, 31, 32, 33, 96, 100])
def test_packing_is_that_of_compressed_tensors_and_can_be_undone(bits, columns):
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1)
    codes = torch.randint(low, high, (5, columns), generator=torch.Generator().manual_seed(0), dtype=torch.int8)
    packed = pack(codes, bits)
    assert packed.shape == (5, packed_words(columns, bits))
    assert torch.equal(packed, pack_to_int32(codes, bits))
    assert torch.equal(unpack(packed, bits, columns), codes)
    assert torch.equal(unpack_from_int32(packed, bits, codes.shape), codes)
    assert torch.equal(pack(codes.t().contiguous(), bits).t(), pack_to_int32(codes.t().contiguous().t(), bits, 0))


def test_a_word_by_hand():
    assert pack(torch.arange(-8, 0, dtype=torch.int8).view(1, 8), 4).tolist() == [[0x76543210]]
    assert pack(torch.full((1, 8), 7, dtype=torch.int8), 4).tolist() == [[-1]]


def test_strided_codes_are_packed_as_they_look():
    codes = torch.randint(-8, 8, (16, 24), dtype=torch.int8).t()
    assert torch.equal(pack(codes, 4), pack(codes.contiguous(), 4))
    assert torch.equal(unpack(pack(codes, 4), 4, 16), codes)


def without_compiler(monkeypatch, work):
    """What `work` gives by whole-array operations."""
    with monkeypatch.context() as patch:
        patch.setattr(rounding, "compiled", lambda: None)
        return work()


@pytest.mark.parametrize("form", ["symmetric", "zero points", "even", "float zero points"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_compiled_loops_give_the_bits_of_whole_array_operations(bits, dtype, form, monkeypatch):
    weight = (normal(301, 1024) * torch.logspace(-6, 1, 301)[:, None]).to(dtype)
    weight[0], weight[1, :128], weight[2, :128], weight[3, ::2] = 0, 0.5, -2, weight[3, 1::2]
    assert weight.numel() >= rounding.LEAST

    def made():
        scale, zero = scales(weight, bits, 128, symmetric="zero" not in form, even=form == "even")
        if form == "float zero points":
            zero = (zero.float() + normal(*zero.shape) / 4).to(dtype)
        codes = encode(weight, scale, zero, bits)
        return scale, zero, codes, pack(codes, bits)

    for one, other in zip(made(), without_compiler(monkeypatch, made), strict=True):
        assert one is other is None or torch.equal(one, other)


def test_compiled_loops_take_views_halves_and_rows_that_do_not_fill_their_words(monkeypatch):
    whole = normal(1030, 2048)
    steps = torch.tensor([[0.5, 1.5, 2.5, -0.5, -1.5, -2.5, -9.0, 9.0]]).repeat(64, 1024)
    for weight in (whole[:1024, 1::2], whole.T[::2, :600], steps, whole[:, :1003], nn.Parameter(whole)):
        one = torch.ones(len(weight), 1)
        work = partial(lambda weight, one: pack(encode(weight, one, None, 4), 4), weight, one)
        assert torch.equal(work(), without_compiler(monkeypatch, work))
        assert torch.equal(scales(weight, 4)[0], without_compiler(monkeypatch, partial(lambda weight: scales(weight, 4)[0], weight)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_group_with_nan_has_no_bounds(dtype):
    weight = normal(256, 1024).to(dtype)
    weight[3, 200], weight[4, 5] = float("nan"), float("-inf")
    weight[5, 1000] = -weight[3, 200]
    scale, _ = scales(weight, 4, 128, symmetric=False)
    assert scale[3].isnan().nonzero().tolist() == [[1]]
    assert scale[5].isnan().nonzero().tolist() == [[7]]
    assert scale[4].isinf().nonzero().tolist() == [[0]]
    assert scale.isfinite().sum() == scale.numel() - 3


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_largest_numbers_of_a_dtype_stay_finite(bits):
    weight = torch.tensor([[65000.0, -65000.0, 1.0, 0.0]], dtype=torch.float16)
    scale, zero = scales(weight, bits)
    found = decode(encode(weight, scale, zero, bits), scale, zero)
    assert found.isfinite().all()
    assert (found[0, :2].float() / weight[0, :2].float() > 0.4).all()

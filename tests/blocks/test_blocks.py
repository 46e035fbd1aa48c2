"""What every stored layer promises, and what each promises alone."""

import json

import pytest
import torch
from torch.nn.functional import embedding, linear

from modelwright.blocks import build
from modelwright.blocks.bit_stack import BitStackLinear
from modelwright.blocks.embedding import PackedEmbedding
from modelwright.blocks.low_rank import LowRankLinear
from modelwright.blocks.packed import PackedLinear
from modelwright.blocks.sparse import SparseLinear
from modelwright.core.errors import ModelError
from modelwright.maths import residual, signed_low_rank
from modelwright.maths.rounding import decode, encode, scales

OUT, IN = 12, 40


def normal(*shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def packed(bits=4, group=8, symmetric=True, bias=True, dtype=torch.float32):
    weight = normal(OUT, IN, dtype=dtype)
    scale, zero = scales(weight, bits, group, symmetric=symmetric)
    codes = encode(weight, scale, zero, bits)
    layer = PackedLinear.from_codes(codes, scale, zero, bits, normal(OUT, dtype=dtype) if bias else None)
    return layer, decode(codes, scale, zero)


def embedded(bits=4, group=8, multiplier=1.0, dtype=torch.float32):
    weight = normal(OUT, IN, dtype=dtype)
    scale, _ = scales(weight, bits, group)
    codes = encode(weight, scale, None, bits)
    return PackedEmbedding.from_codes(codes, scale, bits, multiplier), decode(codes, scale)


def factored(bias=True, dtype=torch.float32):
    tall, wide = normal(OUT, 3, dtype=dtype), normal(3, IN, dtype=dtype)
    return LowRankLinear.from_factors(tall, wide, normal(OUT, dtype=dtype) if bias else None), tall @ wide


def sparse(bias=True, dtype=torch.float32, columns=IN):
    weight = normal(OUT, columns, dtype=dtype)
    weight[weight.abs() < 0.7] = 0
    return SparseLinear.from_dense(weight, normal(OUT, dtype=dtype) if bias else None), weight


def stacked(bias=True, dtype=torch.float32, columns=IN):
    weight = normal(OUT, columns)
    found = residual.stack(weight, 3, lambda rest: signed_low_rank.fit(rest, 2), signed_low_rank.decode)
    layer = BitStackLinear.of(found, [1, 0], dtype, normal(OUT, dtype=dtype) if bias else None)
    return layer, residual.total(found, signed_low_rank.decode).to(dtype)


LAYERS = [
    packed,
    lambda dtype=torch.float32: packed(bits=3, symmetric=False, dtype=dtype),
    lambda dtype=torch.float32: packed(bits=8, group=None, bias=False, dtype=dtype),
    embedded,
    lambda dtype=torch.float32: embedded(bits=5, group=None, multiplier=2.5, dtype=dtype),
    factored,
    lambda dtype=torch.float32: factored(bias=False, dtype=dtype),
    sparse,
    lambda dtype=torch.float32: sparse(bias=False, columns=13, dtype=dtype),
    stacked,
    lambda dtype=torch.float32: stacked(bias=False, columns=13, dtype=dtype),
]


@pytest.fixture(params=LAYERS)
def make(request):
    return request.param


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dense_is_the_weight_it_stands_for(make, dtype):
    layer, weight = make(dtype=dtype)
    assert torch.equal(layer.dense(), weight)
    assert layer.dense().dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forward_is_that_of_the_dense_layer(make, dtype):
    layer, weight = make(dtype=dtype)
    if isinstance(layer, PackedEmbedding):
        ids = torch.tensor([[3, 0], [11, 3]])
        assert torch.equal(layer(ids), embedding(ids, weight) * layer.multiplier)
        return
    inputs = normal(2, 5, weight.shape[1], dtype=dtype)
    expected = linear(inputs, weight, layer.bias)
    tolerance = 1e-5 if dtype == torch.float32 else 0.1
    assert torch.allclose(layer(inputs), expected, atol=tolerance, rtol=tolerance)
    assert layer(inputs).dtype == dtype


def test_a_description_and_a_state_dict_make_it_anew(make):
    layer, weight = make()
    description = json.loads(json.dumps(layer.describe()))
    for device in ("cpu", "meta"):
        anew = build(description, torch.float32, device)
        assert type(anew) is type(layer)
        assert anew.stored_bytes() == layer.stored_bytes()
        assert {n: (t.shape, t.dtype) for n, t in anew.state_dict().items()} == {
            n: (t.shape, t.dtype) for n, t in layer.state_dict().items()
        }
        anew.load_state_dict(layer.state_dict(), assign=True)
        assert torch.equal(anew.dense(), weight)
        assert anew.describe() == layer.describe()


def test_the_bytes_are_those_of_the_state_dict(make):
    layer, _ = make()
    assert layer.stored_bytes() == sum(t.numel() * t.element_size() for t in layer.state_dict().values())


def test_a_cast_leaves_the_codes(make):
    layer, weight = make()
    layer.to(torch.bfloat16)
    assert layer.dense().dtype == torch.bfloat16
    assert torch.allclose(layer.dense().float(), weight, rtol=0.05, atol=0.05)


def test_it_prints_what_it_is(make):
    layer, _ = make()
    assert "=12" in repr(layer)


def test_a_packed_layer_stores_what_compressed_tensors_names():
    layer, _ = packed(symmetric=False)
    shapes = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in layer.state_dict().items()}
    assert shapes == {
        "weight_packed": ((12, 5), torch.int32),
        "weight_scale": ((12, 5), torch.float32),
        "weight_zero_point": ((2, 5), torch.int32),
        "weight_shape": ((2,), torch.int64),
        "bias": ((12,), torch.float32),
    }
    assert "weight_zero_point" not in packed()[0].state_dict()
    assert layer.weight_shape.tolist() == [OUT, IN]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_compressed_tensors_decompresses_it_to_the_same_weight(bits, symmetric):
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    layer, weight = packed(bits, 8, symmetric, dtype=torch.bfloat16)
    codes = unpack_from_int32(layer.weight_packed, bits, torch.Size([OUT, IN]))
    zero = 0
    if not symmetric:
        zero = unpack_from_int32(layer.weight_zero_point, bits, torch.Size([OUT, IN // 8]), packed_dim=0)
        zero = zero.repeat_interleave(8, 1)
    assert torch.equal((codes.int() - zero) * layer.weight_scale.repeat_interleave(8, 1), weight)


def test_a_packed_layer_is_as_small_as_its_bits():
    meta = PackedLinear(1024, 4096, bits=4, group=128, dtype=torch.bfloat16, device="meta")
    assert meta.stored_bytes() == 1024 * 4096 // 2 + 1024 * 32 * 2 + 16
    assert meta(torch.empty(2, 4096, device="meta", dtype=torch.bfloat16)).shape == (2, 1024)


def test_an_embedding_makes_only_the_rows_that_are_looked_up(monkeypatch):
    from modelwright.blocks import embedding as module

    layer, _ = embedded()
    rows = []
    monkeypatch.setattr(module, "unpack", lambda words, *a: rows.append(len(words)) or layer_unpack(words, *a))
    from modelwright.maths.rounding import unpack as layer_unpack

    layer(torch.tensor([1, 2, 2]))
    assert rows == [3]


@pytest.mark.parametrize("columns", [1, 7, 8, 9, 40])
def test_a_sparse_layer_is_exact_for_any_pattern(columns):
    for weight in (torch.zeros(3, columns), torch.ones(3, columns), normal(3, columns).relu()):
        layer = SparseLinear.from_dense(weight)
        assert torch.equal(layer.dense(), weight)
        assert layer.stored_bytes() == 3 * ((columns + 7) // 8) + int((weight != 0).sum()) * 4


def test_a_sparse_layer_can_be_trained_and_keeps_its_zeros():
    layer, weight = sparse()
    layer(normal(4, IN)).sum().backward()
    with torch.no_grad():
        layer.weight_values -= 0.1 * layer.weight_values.grad
    assert torch.equal(layer.dense() == 0, weight == 0)
    assert not torch.equal(layer.dense(), weight)


def test_an_unknown_kind_and_a_bad_description_are_refused():
    with pytest.raises(ModelError, match="Did you mean 'packed'"):
        build({"kind": "paked"})
    with pytest.raises(ModelError, match="known are"):
        build({"kind": "_stored"})
    with pytest.raises(ModelError, match="cannot be made from"):
        build({"kind": "packed", "width": 3})

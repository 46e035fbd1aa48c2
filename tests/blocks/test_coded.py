"""Coded layers give the bits of the layers that they stand for."""

import json

import pytest
import torch
from tiny import tiny
from torch import nn
from torch.nn.functional import embedding, linear

import modelwright as mw
from modelwright.blocks import build
from modelwright.blocks.coded import CodedLinear
from modelwright.blocks.coded_embedding import CodedEmbedding
from modelwright.methods.encode.dfloat11 import Dfloat11
from modelwright.methods.quantize.rtn import Rtn

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def normal(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def embedded(weight, multiplier=1.0):
    return CodedEmbedding.from_linear(CodedLinear.from_dense(weight), multiplier)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (12, 40), (513, 300)])
def test_dense_is_the_weight_and_forward_the_dense_layers_bits(dtype, shape):
    weight, bias = normal(*shape, dtype=dtype), normal(shape[0], dtype=dtype, seed=1)
    layer = CodedLinear.from_dense(weight, bias)
    assert torch.equal(layer.dense(), weight)
    assert layer.dense().dtype == dtype
    inputs = normal(2, 3, shape[1], dtype=dtype, seed=2)
    assert torch.equal(layer(inputs), linear(inputs, weight, bias))
    layer.take_bias(None)
    assert torch.equal(layer(inputs), linear(inputs, weight))


def test_a_matrix_that_lies_the_other_way_stays_so():
    from transformers.pytorch_utils import Conv1D

    old = Conv1D(24, 40)
    old.bias.data.copy_(normal(24))
    layer = CodedLinear.from_dense(old.weight.detach().T).standing_for(old)
    layer.take_bias(old.bias)
    assert layer.transposed
    assert layer.replaces == "Conv1D"
    assert torch.equal(layer.dense(), old.weight.T)
    assert torch.equal(layer(normal(2, 5, 40, seed=1)), old(normal(2, 5, 40, seed=1)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_embedding_gives_the_rows_that_are_looked_up(dtype):
    table = normal(900, 250, dtype=dtype)  # rows that lie across the ends of blocks
    layer = embedded(table)
    ids = torch.tensor([[262, 263, 0], [899, 524, 262]])
    assert torch.equal(layer(ids), embedding(ids, table))
    assert torch.equal(layer.dense(), table)
    assert layer(ids[:0]).shape == (0, 3, 250)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_scaled_embedding_gives_the_bits_of_the_one_that_it_stands_for(dtype):
    from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

    old = Gemma3TextScaledWordEmbedding(50, 24, 0, embed_scale=24**0.5).to(dtype)
    layer = CodedLinear.from_dense(old.weight.detach()).standing_for(old)
    ids = torch.arange(50)
    assert torch.equal(layer(ids), old(ids))
    assert layer.replaces == "Gemma3TextScaledWordEmbedding"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("make", [lambda weight: CodedLinear.from_dense(weight, weight[:, 0]), embedded])
def test_a_description_and_a_state_dict_make_it_anew(make, dtype):
    weight = normal(12, 40, dtype=dtype)
    layer = make(weight)
    description = json.loads(json.dumps(layer.describe()))
    for device in ("cpu", "meta"):
        anew = build(description, dtype, device)
        assert type(anew) is type(layer)
        assert anew.stored_bytes() == layer.stored_bytes() == sum(value.nbytes for value in layer.state_dict().values())
        shapes = [{name: (value.shape, value.dtype) for name, value in one.state_dict().items()} for one in (anew, layer)]
        assert shapes[0] == shapes[1]
        anew.load_state_dict(layer.state_dict(), assign=True)
        assert torch.equal(anew.dense(), weight)
        assert anew.describe() == layer.describe()


def test_a_cast_leaves_the_weight_and_inputs_decide_the_products():
    weight = normal(12, 40, dtype=torch.bfloat16)
    layer = CodedLinear.from_dense(weight).to(torch.float32)
    assert torch.equal(layer.dense(), weight)
    inputs = normal(3, 40)
    assert torch.equal(layer(inputs), linear(inputs, weight.float()))


def test_what_it_cannot_stand_for_is_said():
    layer = CodedLinear.from_dense(normal(12, 40))
    assert layer.why_not(nn.Linear(40, 12)) == layer.why_not(nn.Embedding(12, 40)) == ""
    assert "is a Bilinear" in layer.why_not(nn.Bilinear(1, 1, 1))
    assert layer.nonzeros() == 480


@pytest.mark.parametrize("method", [Dfloat11(where="embed"), Rtn(where="embed", group=32)], ids=repr)
@pytest.mark.parametrize("strange", [-1, 97])
def test_ids_that_are_no_rows_are_refused_as_by_any_embedding(method, strange):
    layer = mw.apply(mw.open(tiny("llama").bfloat16()), method).module.model.embed_tokens
    assert layer(torch.tensor([0, 96])).shape == (2, 64)
    with pytest.raises(IndexError, match="0 to 96"):
        layer(torch.tensor([strange, 0]))

"""quantize.dequantize: the numbers that codes stand for, in plain layers, on which any other method works."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny import outputs, tiny
from torch import nn
from transformers import AutoModelForCausalLM

import modelwright as mw
from modelwright.blocks.dropping import Dropping
from modelwright.blocks.packed import PackedLinear
from modelwright.core.errors import ModelError
from modelwright.core.model import Model, emptied
from modelwright.core.plan import plan
from modelwright.methods.encode.dfloat11 import Dfloat11
from modelwright.methods.prune.magnitude import Magnitude
from modelwright.methods.quantize.dequantize import Dequantize
from modelwright.methods.quantize.fp8 import Fp8
from modelwright.methods.quantize.hqq import Hqq
from modelwright.methods.quantize.nf4 import Nf4
from modelwright.methods.quantize.rtn import Rtn
from modelwright.methods.share.depth import Depth


def packed(kind, method, **config):
    return mw.apply(Model(name=kind, module=tiny(kind, **config)), method)


def test_one_layer_worked_by_hand():
    module = nn.Sequential(nn.Linear(2, 1))
    codes, scale, zero = torch.tensor([[3, -2]], dtype=torch.int8), torch.tensor([[0.5]]), torch.tensor([[1]], dtype=torch.int8)
    layer = PackedLinear.from_codes(codes, scale, zero, bits=4)
    layer.take_bias(module[0].bias)
    bias = module[0].bias
    module[0] = layer
    done = mw.apply(module, Dequantize())[0]
    assert type(done) is nn.Linear
    assert done.weight.tolist() == [[1.0, -1.5]]
    assert done.bias is bias


@pytest.mark.parametrize("method", [Rtn(group=32), Rtn(symmetric=False), Nf4(), Fp8(), Hqq()], ids=repr)
@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen3_moe"])
def test_outputs_stay_and_layers_are_those_of_the_architecture(kind, method):
    model = packed(kind, method)
    before = outputs(model.module)
    done = mw.apply(model, Dequantize())
    assert torch.allclose(outputs(done.module), before, atol=1e-5)
    plain = tiny(kind)
    assert {name: type(layer) for name, layer in done.module.named_modules()} == {
        name: type(layer) for name, layer in plain.named_modules()
    }
    assert done.dense
    assert done.marks == {"float"}


def test_scaled_embeddings_go_on_being_scaled():
    model = packed("gemma3_text", Rtn(group=32, where=["embed", "attn"]), tie_word_embeddings=False)
    before = outputs(model.module)
    done = mw.apply(model, Dequantize())
    assert type(done.module.model.embed_tokens) is type(tiny("gemma3_text").model.embed_tokens)
    assert torch.allclose(outputs(done.module), before, atol=1e-5)


def test_places_that_share_codes_share_the_weight():
    model = packed("llama", Depth(loops=2))
    unpacked = copy.deepcopy(model.module)
    model = mw.apply(model, Rtn(group=32))
    before = outputs(model.module)
    done = mw.apply(model, Dequantize()).module
    weights = [layer.mlp.up_proj.weight for layer in done.model.layers]
    assert len(weights) == 4
    assert len({id(weight) for weight in weights}) == len({id(layer.mlp.up_proj.weight) for layer in unpacked.model.layers}) < 4
    assert torch.allclose(outputs(done), before, atol=1e-5)


def test_other_methods_work_on_the_result_and_plain_transformers_loads_it(tmp_path):
    model = packed("llama", Nf4())
    pruned = mw.apply(mw.apply(model, Dequantize()), Magnitude(sparsity=0.5))
    pruned.save(tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert (loaded.model.layers[0].mlp.up_proj.weight == 0).float().mean() == pytest.approx(0.5, abs=0.01)


def test_the_plan_knows_the_order_and_the_size(small):
    from modelwright.core.errors import PlanError
    from modelwright.core.recipe import Recipe, Step

    rows = plan(Recipe(model=str(small), steps=(Step(Rtn(group=32)), Step(Dequantize()), Step(Magnitude(sparsity=0.5))))).rows
    assert rows[2].bytes == pytest.approx(rows[0].bytes, rel=0.01)
    assert rows[1].bytes < rows[0].bytes
    with pytest.raises(PlanError, match="wants a model that is packed"):
        plan(Recipe(model=str(small), steps=(Step(Dequantize()),)))


def test_guests_are_refused():
    model = packed("llama", Rtn(group=32))
    guest = Dropping(most=8)
    guest.join(model.module.model.layers[0].mlp.up_proj, "dropping")
    with pytest.raises(ModelError, match="no step may change afterwards"):
        mw.apply(model, Dequantize())


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma3_text"])
def test_coded_floats_are_decoded_bit_by_bit(kind):
    module = tiny(kind).bfloat16()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    coded = mw.apply(Model(name=kind, module=module), Dfloat11())
    planned = Dequantize().planned(emptied(coded.module), 0)
    done = mw.apply(coded, Dequantize()).module
    assert all(torch.equal(value, done.state_dict()[name]) for name, value in before.items())
    assert {name: value.shape for name, value in planned.state_dict().items()} == {name: value.shape for name, value in before.items()}

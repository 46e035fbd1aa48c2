"""Adapters beside packed weights: QLoRA (Dettmers et al. 2023, arXiv:2305.14314, section 3)."""

import copy

import pytest
import torch
from calibration import TEXT, lettered
from peft import PeftModel
from tiny import outputs, tiny_inputs

import modelwright as mw
from modelwright.blocks._stored import Stored
from modelwright.blocks.levels import LevelsLinear
from modelwright.core.errors import ModelError, PlanError
from modelwright.core.training import Training, next_token, train
from modelwright.methods.adapt.fold import Fold
from modelwright.methods.adapt.lora import Lora
from modelwright.methods.encode.dfloat11 import Dfloat11
from modelwright.methods.quantize.bipolar import Bipolar
from modelwright.methods.quantize.dequantize import Dequantize
from modelwright.methods.quantize.fp8 import Fp8
from modelwright.methods.quantize.llm_int8 import LlmInt8
from modelwright.methods.quantize.nf4 import Nf4
from modelwright.methods.quantize.rtn import Rtn
from modelwright.methods.train import Train

BRIEF = Train(tokens=256, batch=4, length=16, learning_rate=1e-2)
BASES = [Nf4(), Rtn(group=32), Rtn(group=32, symmetric=False), Bipolar(group=32), Fp8(), Dfloat11(where=("attn", "mlp"))]


def adapted(base=None, kind="llama", **settings):
    """A packed tiny model with an adapter beside all its linears, whose factors are not 0."""
    model = mw.apply(lettered(kind), [base or Nf4(), Lora(rank=4, **settings)])
    generator = torch.Generator().manual_seed(0)
    for name, value in model.module.named_parameters():
        if "lora_B" in name:
            value.data.copy_(0.05 * torch.randn(value.shape, generator=generator))
    return model


def packed(module):
    return {name: layer for name, layer in module.named_modules() if isinstance(layer, Stored)}


def backward(module):
    module.zero_grad()
    ids = tiny_inputs(module)["input_ids"]
    next_token(module, ids, torch.ones_like(ids, dtype=torch.bool))[0].backward()
    return {name: value.grad.clone() for name, value in module.named_parameters() if value.grad is not None}


def dense(model):
    """The same model with the dense weights that it computes with, its adapter beside them."""
    return mw.apply(copy.deepcopy(model), Dequantize())


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_an_adapter_that_was_not_trained_leaves_the_packed_model_as_it_is(kind):
    model = mw.apply(lettered(kind), Nf4())
    expected = outputs(model.module)
    mw.apply(model, Lora())
    assert torch.equal(outputs(model.module), expected)
    assert model.marks == {"packed", "adapters"}


@pytest.mark.parametrize("base", BASES, ids=repr)
def test_gradients_reach_the_adapters_alone_and_are_those_beside_dense_weights(base):
    model = adapted(base)
    found, expected = backward(model.module), backward(dense(model).module)
    assert len(found) == 4 * 7 * 2
    assert all("lora_" in name and value.any() for name, value in found.items())
    for name, value in found.items():
        assert torch.allclose(value, expected[name], rtol=1e-3, atol=1e-6), name


@pytest.mark.parametrize("base", BASES, ids=repr)
def test_no_dense_weight_is_kept_from_one_pass_to_the_other(base):
    model = adapted(base)
    shapes = {tuple(layer.dense().shape) for layer in packed(model.module).values()}
    held = set()

    def keep(value):
        held.add(tuple(value.shape))
        held.add(tuple(value.T.shape) if value.ndim == 2 else ())
        return value

    def run(module):
        held.clear()
        ids = tiny_inputs(module)["input_ids"]
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
            next_token(module, ids, torch.ones_like(ids, dtype=torch.bool))
        return held & shapes

    assert not run(model.module)
    assert run(dense(model).module) == shapes  # which beside dense weights are kept


def test_training_moves_the_adapters_and_no_bit_of_the_packed_base():
    model = mw.apply(lettered(), [Nf4(), Lora(rank=4)])
    before = {name: value.clone() for name, value in model.module.state_dict().items()}
    mw.apply(model, BRIEF, data=TEXT)
    base = packed(model.module)
    assert len(base) == 4 * 7
    assert {type(layer) for layer in base.values()} == {LevelsLinear}
    assert not any(value.is_floating_point() and value.ndim == 2 for layer in base.values() for value in layer.state_dict().values())
    for name, value in model.module.state_dict().items():
        assert torch.equal(value, before[name]) is ("lora_" not in name), name
    dense_left = [name for name, layer in model.module.named_modules() if isinstance(layer, torch.nn.Linear) and "lora_" not in name]
    assert [name.rpartition(".")[2] for name in dense_left] == ["lm_head"]


@pytest.mark.parametrize("base", [Nf4(), Rtn(group=32), Fp8()], ids=repr)
def test_the_base_is_as_small_while_it_trains_as_it_is_stored(base):
    model = lettered()
    model.module.bfloat16()
    mw.apply(model, [base, Lora(rank=4)])
    layers, seen = packed(model.module), []

    def loss(module, ids, mask):
        for layer in layers.values():
            rows, columns = layer.dense().shape
            seen.append(max(value.nbytes for value in layer.state_dict().values()) / (rows * columns))
        return next_token(module, ids, mask)

    train(model.module, torch.arange(400) % 90, Training(tokens=64, batch=2, length=16), loss)
    assert len(seen) == 2 * len(layers)
    assert max(seen) <= 1  # bytes for each weight; 4 if it was dense


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft's, in from_pretrained
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_plain_peft_puts_the_saved_adapter_on_the_dense_base(kind, tmp_path):
    base = mw.apply(lettered(kind), Nf4())
    plain = mw.apply(copy.deepcopy(base), Dequantize())
    base.save(tmp_path / "base")
    model = mw.apply(mw.open(tmp_path / "base", tokenizer=base.tokenizer), [Lora(rank=4, alpha=12), BRIEF], data=TEXT)
    model.save(tmp_path / "adapter")
    assert not (tmp_path / "adapter" / "model.safetensors").exists()
    found = PeftModel.from_pretrained(plain.module, str(tmp_path / "adapter")).eval()
    assert torch.allclose(outputs(found), outputs(model.module), atol=1e-5)
    again = mw.open(tmp_path / "adapter")
    assert again.marks == {"packed", "adapters"}
    assert torch.equal(outputs(again.module), outputs(model.module))
    assert len(packed(again.module)) == len(packed(base.module))
    trained = {name for name, value in again.module.named_parameters() if value.requires_grad}
    assert trained
    assert all("lora_" in name for name in trained)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_an_update_goes_into_weights_only_when_they_are_dense(kind):
    model = adapted(kind=kind)
    with pytest.raises(PlanError, match=r"adapt\.fold wants a model that is float"):
        mw.apply(model, Fold())
    with pytest.raises(ModelError, match=r"cannot go into a packed weight.*quantize\.dequantize"):
        model.module.merge_and_unload()
    expected = outputs(model.module)
    mw.apply(model, [Dequantize(), Fold()])
    assert torch.allclose(outputs(model.module), expected, atol=1e-5)
    assert not packed(model.module)


def test_layers_that_round_their_inputs_are_refused():
    with pytest.raises(ModelError, match=r"rounds its inputs, so that no gradient passes"):
        mw.apply(lettered(), [LlmInt8(), Lora()])


def test_a_packed_model_without_adapters_does_not_train():
    with pytest.raises(PlanError, match="train wants a model that is float"):
        mw.apply(lettered(), [Nf4(), BRIEF], data=TEXT)


def test_half_of_the_matrices_can_bear_adapters():
    model = adapted(where="attn.{q,v}")
    found = backward(model.module)
    assert len(found) == 4 * 2 * 2
    assert all(value.any() for value in found.values())

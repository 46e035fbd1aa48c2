import copy

import pytest
import torch
from calibration import SHORT, lettered, normal, surprise, taught
from safetensors import safe_open
from safetensors.torch import save_file
from tiny import outputs

from modelwright.blocks.phases import PhaseLinear
from modelwright.core import walk
from modelwright.core.errors import PlanError, SiteError
from modelwright.core.given import Given
from modelwright.core.model import RECORD, stored_bytes
from modelwright.methods.distill.recover import Recover
from modelwright.methods.quantize.fairy2i import Fairy2i
from modelwright.methods.quantize.pack import Pack
from modelwright.methods.share.depth import Depth


def test_a_case_by_hand():
    # A = [[3, -1], [1, 3]] is U = 3 + i, W = 0: one term makes U = 3, the second adds i.
    weight = torch.tensor([[3.0, -1.0], [1.0, 3.0]])
    assert Fairy2i(terms=1).tensor(weight).dense().tolist() == [[3.0, 0.0], [0.0, 3.0]]
    assert Fairy2i(terms=2).tensor(weight).dense().tolist() == weight.tolist()


def test_more_terms_lose_less():
    weight = normal(48, 96)
    lost = [float((Fairy2i(terms=terms).tensor(weight).dense() - weight).norm()) for terms in range(1, 6)]
    assert lost == sorted(lost, reverse=True)


def test_the_gradient_of_the_weight_is_that_of_the_rounded_one():
    layer, inputs, push = Fairy2i().tensor(normal(12, 20)), normal(5, 20, seed=1), normal(5, 12, seed=2)
    layer(inputs).backward(push)
    rounded = layer.dense().requires_grad_()
    torch.nn.functional.linear(inputs, rounded).backward(push)
    assert torch.equal(layer.weight_master.grad, rounded.grad)


@pytest.mark.parametrize("by_row", [False, True])
@pytest.mark.parametrize("columns", [2, 40, 46])
def test_packed_it_computes_the_same_and_stores_two_bits_for_each_complex_entry_and_term(columns, by_row):
    layer, inputs = Fairy2i(terms=3, by_row=by_row).tensor(normal(12, columns)), normal(5, columns, seed=1)
    packed = layer.pack()
    assert torch.equal(packed(inputs), layer(inputs))
    assert packed.weight_packed.nbytes == 3 * 12 * -(-columns // 8)
    assert packed.weight_scale.nbytes == 3 * 4 * 4 * (6 if by_row else 1)
    assert layer.stored_bytes() == 4 * 12 * columns


def test_the_first_terms_of_a_file_are_a_layer(tmp_path):
    weight = normal(12, 40)
    save_file(Fairy2i(terms=4).tensor(weight).pack().state_dict(), tmp_path / "layer.safetensors")
    short = PhaseLinear(12, 40, terms=2, packed=True)
    with safe_open(tmp_path / "layer.safetensors", "pt") as file:
        short.load_state_dict({name: file.get_slice(name)[:2] for name in file.keys()})  # noqa: SIM118
    assert torch.equal(short.dense(), Fairy2i(terms=2).tensor(weight).dense())
    assert torch.equal(Fairy2i(terms=4).tensor(weight).pack().first(2).dense(), short.dense())


def test_odd_sizes_are_refused_by_name_and_can_be_left_out():
    model = lettered("llama", intermediate_size=45)
    with pytest.raises(SiteError, match="mlp.gate_proj.weight has the shape .45, 64., and complex numbers take even"):
        walk.change(model, Fairy2i(), Given())
    walk.change(model, Fairy2i(skip="mlp"), Given())
    assert isinstance(model.module.model.layers[0].self_attn.q_proj, PhaseLinear)
    assert isinstance(model.module.model.layers[0].mlp.up_proj, torch.nn.Linear)


def test_training_makes_up_for_much_of_it_and_packed_it_loads(tmp_path):
    model, given = taught()
    start, given.teacher = surprise(model), copy.deepcopy(model)
    broken = surprise(walk.change(model, Fairy2i(terms=1), Given()))
    assert broken > start + 0.3
    walk.change(model, Recover(**SHORT), given)
    assert surprise(model) < broken - 0.5 * (broken - start)
    before = outputs(model.module)
    walk.change(model, Pack(), Given())
    assert torch.equal(outputs(model.module), before)
    model.save(tmp_path / "out")
    assert torch.equal(outputs(walk.open(tmp_path / "out").module), before)


def test_layers_of_shared_weights_are_packed_once():
    model = lettered()
    walk.change(model, Depth(loops=2), Given())
    walk.change(model, Fairy2i(), Given())
    before, held = outputs(model.module), stored_bytes(model.module)
    walk.change(model, Pack(), Given())
    layers = [block.mlp.up_proj for block in model.module.model.layers]
    assert len({id(layer) for layer in layers}) == len(layers)
    assert len({id(layer.weight_packed) for layer in layers}) < len(layers)
    assert stored_bytes(model.module) < held
    assert torch.equal(outputs(model.module), before)


def test_a_model_without_such_layers_is_refused_and_one_without_a_record_is_known_by_them(tmp_path):
    model = lettered()
    with pytest.raises(PlanError, match="quantize.pack wants a model that is rounding"):
        walk.change(model, Pack(), Given())
    for method, marks in ((Fairy2i(), {"float", "rounding"}), (Pack(), {"packed"})):
        walk.change(model, method, Given())
        model.save(tmp_path / method.name())
        (tmp_path / method.name() / RECORD).unlink()
        assert walk.open(tmp_path / method.name()).marks == marks == model.marks

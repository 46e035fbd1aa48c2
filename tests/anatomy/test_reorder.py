import pytest
import torch
from tiny import MODELS, outputs, tiny

from modelwright.anatomy.reorder import movable, reorder
from modelwright.core.model import emptied


def shuffled(where, seed=0):
    runs, _, width = where.inputs.shape
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(width, generator=generator) for _ in range(runs)])


@pytest.mark.parametrize("kind", [kind for kind in MODELS if kind != "clip"])
def test_inputs_that_trade_places_leave_the_outputs_and_come_back(kind):
    module = tiny(kind)
    before, state = outputs(module), {name: value.clone() for name, value in module.state_dict().items()}
    found = movable(module)
    assert found
    orders = {name: shuffled(where) for name, where in found.items()}
    for name, where in found.items():
        reorder(module, where, orders[name])
        assert not torch.equal(module.get_parameter(name), state[name])
    assert torch.allclose(outputs(module), before, atol=1e-5)
    for name, where in found.items():
        reorder(module, where, orders[name].argsort(1))
    assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())


def test_heads_that_share_a_value_head_move_alike():
    where = movable(tiny("llama"))["model.layers.0.self_attn.o_proj.weight"]  # 8 query heads, 4 key-value heads of width 8
    assert where.inputs.shape == (4, 2, 8)
    taken = where.moved(torch.arange(8).flip(0).expand(4, 8))
    assert taken.tolist() == [8 * head + 7 - place for head in range(8) for place in range(8)]
    assert [name for name, _, _ in where.makers] == ["model.layers.0.self_attn.v_proj.weight"]


def test_an_empty_model_tells_the_same():
    one, other = movable(tiny("phi3")), movable(emptied(tiny("phi3")))
    assert one.keys() == other.keys()
    assert len(one) == 8
    assert all(torch.equal(one[name].inputs, other[name].inputs) for name in one)


def test_experts_and_the_residual_stream_do_not_move():
    assert {name.rpartition("self_attn.")[2] for name in movable(tiny("mixtral"))} == {"o_proj.weight"}

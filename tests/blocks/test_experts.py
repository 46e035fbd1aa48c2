"""Split experts compute what fused experts compute."""

import copy

import pytest
import torch
from tiny import outputs, tiny

from modelwright.anatomy import anatomy_of
from modelwright.blocks.experts import SplitExperts, split_experts

NAMES = ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe"]


@pytest.mark.parametrize("name", NAMES)
def test_split_experts_give_the_same_outputs(name):
    model = tiny(name)
    expected = outputs(model)
    paths = split_experts(model)
    assert len(paths) == (3 if name == "qwen2_moe" else 4)
    assert (outputs(model) - expected).abs().max() < 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_splitting_and_fusing_keeps_every_bit(name):
    model = tiny(name)
    expected, before = outputs(model), copy.deepcopy(model.state_dict())
    for path in split_experts(model):
        model.set_submodule(path, model.get_submodule(path).to_fused())
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(weight, before[key]) for key, weight in model.state_dict().items())
    assert torch.equal(outputs(model), expected)


@pytest.mark.parametrize("name", NAMES)
def test_split_experts_are_sites_of_their_own(name):
    model = tiny(name)
    split_experts(model)
    sites = [site for site in anatomy_of(model).sites(model) if site.role.startswith("experts")]
    assert {site.role for site in sites} == {"experts.gate", "experts.up", "experts.down"}
    assert all(site.stack == 0 for site in sites)
    assert len(sites) == 3 * 8 * (3 if name == "qwen2_moe" else 4)


def test_each_expert_sees_only_its_tokens():
    model = tiny("mixtral")
    split_experts(model)
    block, seen = model.model.layers[0].mlp, {}
    for n, expert in enumerate(block.experts):
        expert.gate_proj.register_forward_hook(lambda _, x, out, n=n: seen.__setitem__(n, x[0]))
    x = torch.randn(30, 64, generator=torch.Generator().manual_seed(1))
    _, weights, chosen = block.gate(x)
    block.experts(x, chosen, weights)
    for n in range(8):
        routed = (chosen == n).any(1)
        assert torch.equal(seen.get(n, x[:0]), x[routed])


def test_an_expert_without_tokens_adds_nothing():
    split = SplitExperts.from_fused(tiny("mixtral").model.layers[0].mlp.experts)
    x, weights = torch.ones(2, 64), torch.full((2, 2), 0.5)
    assert torch.equal(split(x, torch.full((2, 2), 8), weights), torch.zeros(2, 64))


def test_gradients_flow_and_training_flags_stay():
    fused = tiny("qwen3_moe").model.layers[0].mlp.experts.requires_grad_(False)
    split = SplitExperts.from_fused(fused)
    assert not any(weight.requires_grad for weight in split.parameters())
    split.requires_grad_(True)
    split(torch.ones(1, 64), torch.tensor([[3, 5]]), torch.ones(1, 2)).sum().backward()
    assert split[3].down_proj.weight.grad is not None
    assert split[0].down_proj.weight.grad is None


def test_splitting_leaves_the_fused_module_as_it_was():
    fused = tiny("mixtral").model.layers[0].mlp.experts
    before = fused.gate_up_proj.clone()
    split = SplitExperts.from_fused(fused)
    with torch.no_grad():
        split[0].gate_proj.weight.zero_()
    assert torch.equal(fused.gate_up_proj, before)


def test_changed_layers_cannot_be_fused():
    split = SplitExperts.from_fused(tiny("mixtral").model.layers[0].mlp.experts)
    split[2].up_proj = torch.nn.Identity()
    with pytest.raises(TypeError, match="keep it split"):
        split.to_fused()


def test_split_experts_copy():
    split = SplitExperts.from_fused(tiny("mixtral").model.layers[0].mlp.experts)
    again = copy.deepcopy(split).to_fused()
    assert torch.equal(again.down_proj, split.to_fused().down_proj)

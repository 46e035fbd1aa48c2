"""All matrices read from one array of stored values."""

from __future__ import annotations

import copy
import json
import pickle

import pytest
import torch
from safetensors import safe_open

import modelwright as mw
from modelwright.anatomy.removal import remove_blocks
from modelwright.blocks.hashed import HashedLinear
from modelwright.core import measure, sharing, tiny
from modelwright.core.errors import ModelwrightError, PlanError, SettingError, SiteError
from modelwright.core.model import Model, open, stored_bytes
from modelwright.maths.hashing import Map
from modelwright.methods.share.depth import Depth
from modelwright.methods.share.roast import BOUND, Roast

BLOCK = 2 * 64 * 64 + 2 * 32 * 64 + 3 * 160 * 64  # weights of a tiny Llama's block


def layers(module) -> list[HashedLinear]:
    return [layer for layer in module.modules() if isinstance(layer, HashedLinear)]


@pytest.mark.parametrize("kind", ["pareto", "roast", "hashednet"])
def test_unique_parameters_are_the_values_and_what_is_not_shared(kind):
    before, module = tiny.tiny(), mw.apply(tiny.tiny(), Roast(keep=0.3, kind=kind))
    size = int(0.3 * 4 * BLOCK)
    assert measure.count(module)[0] == size + measure.count(before)[0] - 4 * BLOCK
    assert stored_bytes(module) == stored_bytes(before) - 4 * (4 * BLOCK - size)
    assert measure.flops_per_token(module) == measure.flops_per_token(before)
    assert len({id(layer.memory) for layer in layers(module)}) == 1


def test_a_full_array_is_the_trained_model():
    assert torch.allclose(tiny.outputs(mw.apply(tiny.tiny(), Roast(keep=1.0))), tiny.outputs(tiny.tiny()), atol=1e-5)


def test_random_values_have_the_deviation_of_the_weights():
    before = tiny.tiny()
    with torch.no_grad():
        before.model.layers[2].mlp.up_proj.weight.mul_(7)
    wanted = before.model.layers[2].mlp.up_proj.weight.std().item()
    module = mw.apply(before, Roast(keep=0.5, initial="random"))
    found = module.model.layers[2].mlp.up_proj
    assert found.dense().std().item() == pytest.approx(wanted, rel=0.03)
    assert found.memory.abs().max().item() <= BOUND


def test_the_fit_is_better_the_more_is_kept():
    weight = tiny.tiny().model.layers[1].mlp.up_proj.weight
    found = [mw.apply(tiny.tiny(), Roast(keep=keep)).model.layers[1].mlp.up_proj.dense() for keep in (0.2, 0.5, 0.9)]
    errors = [float((one - weight).detach().square().mean() / weight.detach().square().mean()) for one in found]
    assert errors[0] > errors[1] > errors[2]
    assert errors[1] == pytest.approx(0.5, abs=0.05)  # the mean of two independent weights misses half of their square


def test_the_forward_is_that_of_the_dense_weights():
    tied, dense = (mw.apply(tiny.tiny("gpt2"), Roast(keep=0.4, store=store)) for store in ("shared", "dense"))
    assert torch.allclose(tiny.outputs(tied), tiny.outputs(dense), atol=1e-5)
    assert layers(dense) == []
    assert sharing.shared(dense) == {}


def full_step(module, rate: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The weights of all layers, and as they would be after a plain gradient step each for itself."""
    weights = [layer.dense().detach().requires_grad_() for layer in layers(module)]
    inputs = tiny.tiny_inputs(module)
    for layer, weight in zip(layers(module), weights, strict=True):
        layer.forward = lambda x, weight=weight: torch.nn.functional.linear(x, weight)
    module(**inputs).logits.square().mean().backward()
    for layer in layers(module):
        del layer.forward
    before = torch.cat([weight.detach().flatten() for weight in weights])
    return before, before - rate * torch.cat([weight.grad.flatten() for weight in weights])


def fitted(module, flat: torch.Tensor) -> torch.Tensor:
    """The nearest weights that an array can give."""
    numbers = [layer.map for layer in layers(module)]
    size = numbers[0].size
    rows = torch.zeros(len(flat), dtype=torch.float64)
    total, squares = torch.zeros(size, dtype=torch.float64), torch.zeros(size, dtype=torch.float64)
    places = torch.cat([one.places(0, one.shape[0])[0] for one in numbers])
    factors = torch.cat([one.places(0, one.shape[0])[1] for one in numbers]).double()
    total.index_add_(0, places, flat.double() * factors)
    squares.index_add_(0, places, factors**2)
    rows = (total / squares)[places] * factors
    return rows.float()


def test_a_gradient_step_of_the_values_is_the_projected_step_of_the_weights():
    module = mw.apply(tiny.tiny(), Roast(keep=0.3))
    before, after = full_step(module, 0.1)
    assert torch.allclose(fitted(module, before), before, atol=1e-6)
    module.zero_grad()
    module(**tiny.tiny_inputs(module)).logits.square().mean().backward()
    memory = layers(module)[0].memory
    with torch.no_grad():
        memory -= 0.1 * memory.grad
    moved = torch.cat([layer.dense().detach().flatten() for layer in layers(module)])
    assert not torch.allclose(moved, before, atol=1e-4)
    assert torch.allclose(moved, fitted(module, after), atol=1e-5)


@pytest.mark.parametrize("kind", ["pareto", "roast", "hashednet"])
def test_without_scaling_the_gradient_is_that_of_indexing(kind):
    module = mw.apply(tiny.tiny(), Roast(keep=0.3, kind=kind, scaling="none"))
    inputs = tiny.tiny_inputs(module)
    module(**inputs).logits.square().mean().backward()
    memory = layers(module)[0].memory
    found = memory.grad.clone()
    memory.grad = None
    for layer in layers(module):
        layer.forward = lambda x, layer=layer: torch.nn.functional.linear(x, layer.dense())
    module(**inputs).logits.square().mean().backward()
    assert torch.allclose(found, memory.grad, atol=1e-5)


def test_scalings_differ_by_their_divisors():
    grads = {}
    for scaling in ("projection", "mean", "root", "none"):
        module = mw.apply(tiny.tiny(), Roast(keep=0.3, scaling=scaling))
        module(**tiny.tiny_inputs(module)).logits.square().mean().backward()
        grads[scaling] = layers(module)[0].memory.grad * layers(module)[0].divisor()
    assert all(torch.allclose(found, grads["none"], rtol=1e-4, atol=1e-6) for found in grads.values())


@pytest.mark.parametrize("kind", ["gpt2", "qwen2", "qwen3_moe", "bert"])
def test_it_comes_back_from_disk_with_one_array_in_the_files(kind, tmp_path):
    model = Model(name=kind, module=tiny.tiny(kind))
    mw.apply(model, Roast(keep=0.5))
    before = tiny.outputs(model.module)
    model.save(tmp_path / "out")
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert sum(name.endswith(".memory") for name in file.keys()) == 1  # noqa: SIM118
    assert "int64" not in json.dumps(json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"])
    loaded = open(tmp_path / "out")
    assert torch.allclose(tiny.outputs(loaded.module), before, atol=1e-5)
    assert len({id(layer.memory) for layer in layers(loaded.module)}) == 1
    assert stored_bytes(loaded.module) == stored_bytes(model.module)


def test_a_loaded_model_divides_gradients_as_before(tmp_path):
    model = Model(name="llama", module=tiny.tiny())
    mw.apply(model, Roast(keep=0.3))
    model.save(tmp_path / "out")
    grads = []
    for module in (model.module, open(tmp_path / "out").module):
        module.zero_grad()
        module(**tiny.tiny_inputs(module)).logits.square().mean().backward()
        grads.append(layers(module)[0].memory.grad)
    assert torch.allclose(*grads, atol=1e-6)


def test_layers_that_are_gone_do_not_count_in_the_divisor():
    def gradient(module):
        module.zero_grad()
        module(**tiny.tiny_inputs(module)).logits.square().mean().backward()
        return layers(module)[0].memory.grad

    module = mw.apply(tiny.tiny(), Roast(keep=0.3))
    gradient(module)
    remove_blocks(module, [1])
    replaced = module.model.layers[0].mlp.up_proj
    plain = torch.nn.Linear(replaced.in_features, replaced.out_features, bias=False)
    plain.weight.data = replaced.dense().detach()
    module.model.layers[0].mlp.up_proj = plain
    untied = module.model.layers[2].self_attn.o_proj
    untied.memory = torch.nn.Parameter(untied.memory.detach().clone())
    del replaced
    fresh = copy.deepcopy(module)
    assert torch.equal(gradient(module), gradient(fresh))
    read = torch.cat([layer.map.places(0, layer.map.shape[0])[0] for layer in layers(module) if layer is not untied])
    squares = torch.cat([torch.full((layer.map.shape[0] * layer.map.shape[1],), layer.map.scale**2)
                         for layer in layers(module) if layer is not untied])  # fmt: skip
    expected = torch.zeros(layers(module)[0].map.size).index_add_(0, read, squares)
    assert torch.allclose(layers(module)[0].divisor(), torch.where(expected > 0, expected, 1.0), rtol=1e-4)


def test_a_layer_that_has_read_can_be_pickled():
    module = mw.apply(tiny.tiny(), Roast(keep=0.3))
    expected = tiny.outputs(module)
    again = pickle.loads(pickle.dumps(module))
    assert torch.equal(tiny.outputs(again), expected)


def test_the_seed_decides_the_map():
    one, same, other = (mw.apply(tiny.tiny(), Roast(keep=0.3), seed=seed) for seed in (1, 1, 2))
    assert torch.equal(tiny.outputs(one), tiny.outputs(same))
    assert not torch.allclose(tiny.outputs(one), tiny.outputs(other))


def test_each_matrix_may_have_an_array_of_its_own():
    module = mw.apply(tiny.tiny(), Roast(keep=0.25, scope="tensor"))
    assert [layer.memory.numel() for layer in layers(module)] == [layer.weights() // 4 for layer in layers(module)]
    assert len({id(layer.memory) for layer in layers(module)}) == len(layers(module)) == 28
    assert sharing.shared(module) == {}


def test_small_matrices_and_skipped_roles_stay():
    module = mw.apply(tiny.tiny(), Roast(keep=0.3, least=4000, skip="attn.o"))
    names = {name.rsplit(".", 1)[1] for name, layer in module.named_modules() if isinstance(layer, HashedLinear)}
    assert names == {"q_proj", "gate_proj", "up_proj", "down_proj"}


def test_blocks_that_share_read_one_matrix():
    module = mw.apply(mw.apply(tiny.tiny(), Depth(spare_first=0, spare_last=0, loops=4)), Roast(keep=0.5))
    assert len(layers(module)) == 28
    assert len({layer.map.offset for layer in layers(module)}) == 7
    assert layers(module)[0].memory.numel() == BLOCK // 2
    assert measure.flops_per_token(module) == measure.flops_per_token(tiny.tiny())


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"kind": "roast", "keep": 0.0001}, "gives an array of .* and needs 1025"),
        ({"keep": 0.0}, "gives an array of 0 values"),
        ({"where": "embed"}, "is an embedding"),
        ({"least": 10**6}, "chooses no weight"),
    ],
)
def test_what_cannot_be_is_refused_and_stays_as_it_was(settings, words):
    module = tiny.tiny("olmoe")
    before = set(module.state_dict())
    with pytest.raises(ModelwrightError, match=words):
        mw.apply(module, Roast(**settings))
    assert set(module.state_dict()) == before
    with pytest.raises(SettingError, match="kind"):
        Roast(kind="murmur")


def test_adapters_are_not_shared():
    model = Model(name="llama", module=tiny.tiny())
    mw.apply(model, mw.core.find.find("adapt.lora")(rank=2))
    with pytest.raises(PlanError, match="bears adapters"):
        mw.apply(model, Roast())


def test_it_trains_in_a_recipe_and_its_bytes_are_planned(small, text, tmp_path):
    recipe = {
        "model": str(small),
        "data": str(text),
        "steps": [
            {"share.roast": {"keep": 0.5}},
            {"distill.recover": {"teacher": "$input", "tokens": 64, "batch": 2, "length": 16, "learning_rate": 0.001}},
        ],
        "save": str(tmp_path / "out"),
    }
    rows = mw.plan(recipe).rows
    assert "after `import modelwright`" in rows[1].notes[-1]
    mw.run(recipe)
    made = open(tmp_path / "out")
    assert stored_bytes(made.module) == rows[-1].bytes < rows[0].bytes
    assert measure.sizes(made)["flops_per_token"] == rows[0].flops_per_token


def test_blocks_of_two_matrices_are_read_from_places_of_their_own():
    one, other = (Map("roast", 5000, 0, offset, (64, 64), 1.0).places(0, 64)[0] for offset in (0, 64 * 64))
    assert not torch.equal(one, other)
    for places in (one, other):
        block = places.view(64, 64)[:32, :32]
        assert torch.equal(block - block[0, 0], torch.arange(1024).view(32, 32))


def test_weights_that_are_not_finite_are_not_shared_with_all():
    module = tiny.tiny()
    module.model.layers[1].mlp.up_proj.weight.data[0, 0] = torch.nan
    with pytest.raises(SiteError, match=r"model.layers.1.mlp.up_proj.weight holds NaN or infinity"):
        mw.apply(module, Roast())
    assert module.state_dict().keys() == tiny.tiny().state_dict().keys()

"""APET: a random choice of tensors under a budget."""

import peft
import pytest
import torch
from calibration import TEXT, lettered
from tiny import outputs, tiny

import modelwright as mw
from modelwright.core import plan, tuners
from modelwright.core.errors import ModelError, SettingError
from modelwright.core.model import stored_bytes
from modelwright.methods.adapt.apet import Apet, groups
from modelwright.methods.adapt.fold import Fold
from modelwright.methods.train import Train

BRIEF = Train(tokens=256, batch=4, length=16, learning_rate=1e-2, weight_decay=0.0)


def adapted(kind="llama", seed=0, **settings):
    return mw.apply(lettered(kind), Apet(**{"parameters": 60_000, "inner": 8, **settings}), seed=seed)


def drawn(model):
    """What trains at each layer, and the numbers in it."""
    config = model.module.peft_config["default"]
    layers = {path: layer for path, layer in model.module.get_base_model().named_modules() if isinstance(layer, tuners.Bearer)}
    sizes = {path: sum(value.numel() for value in layer.parts["default"].parameters()) for path, layer in layers.items()}
    return {path: config.method(path).drawn for path in layers}, sizes


def trained(model):
    return sum(value.numel() for value in model.module.parameters() if value.requires_grad)


def taken(budget, sizes, order):
    """The numbers taken by hand: one after another, whatever still fits."""
    found = []
    for place in order:
        if sizes[place] <= budget - sum(sizes[one] for one in found):
            found.append(place)
    return found


def test_a_case_by_hand():
    # One layer of 4 x 6 with a bias, rank 1 and width 2: a low-rank update has 10 numbers, a bottleneck 2 · 2 · 4 = 16, the weight 24 and
    # the bias 4. Half of 54 is 27: of the added ones both fit, of the base's own the weight alone, or the bias and then no weight.
    method = Apet(parameters=54, rank=1, inner=2)
    assert groups(method, (4, 6), True) == {"low-rank": 10, "bottleneck": 16, "weight": 24, "bias": 4}
    seen = set()
    for seed in range(20):
        torch.manual_seed(seed)
        found = method.divided({"one": (method, (4, 6), True)})["one"]["drawn"]
        assert set(found[:2]) == {"low-rank", "bottleneck"}
        seen.add(found[2:])
    assert seen == {("weight",), ("bias",)}


def test_what_does_not_fit_is_passed_and_the_next_is_tried():
    method = Apet(parameters=2000, kinds=("weight",))
    layers = {str(size): (method, (1, size), False) for size in (700, 600, 500, 400, 300, 200)}
    for seed in range(5):
        torch.manual_seed(seed)
        found = {int(path) for path, own in method.divided(layers).items() if own["drawn"]}
        torch.manual_seed(seed)
        torch.randperm(0)
        order = torch.randperm(6).tolist()
        sizes = [700, 600, 500, 400, 300, 200]
        assert found == {sizes[place] for place in taken(1000, sizes, order)}


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("parameters", [3_000, 20_000, 60_000, 10**7])
def test_the_budget_is_never_exceeded_and_groups_are_whole(kind, parameters):
    for seed in range(3):
        model = adapted(kind, seed, parameters=parameters)
        chosen, sizes = drawn(model)
        assert 0 < trained(model) == sum(sizes.values()) <= parameters
        every = []
        for path, bearer in ((path, model.module.get_base_model().get_submodule(path)) for path in chosen):
            offered = groups(Apet(inner=8), *tuners.shape_of(bearer.get_base_layer()))
            assert sizes[path] == sum(offered[kind] for kind in chosen[path])
            every.append(set(offered) == set(chosen[path]))
        assert all(every) is (parameters == 10**7)


def test_each_half_of_the_budget_is_for_its_kinds():
    model = adapted(parameters=40_000)
    chosen, _ = drawn(model)
    shapes = {path: tuners.shape_of(model.module.get_base_model().get_submodule(path).get_base_layer()) for path in chosen}
    halves = [sum(groups(Apet(inner=8), *shapes[path])[kind] for path, kinds in chosen.items() for kind in kinds if kind in half)
              for half in (("low-rank", "bottleneck"), ("weight", "bias"))]  # fmt: skip
    assert all(15_000 < half <= 20_000 for half in halves)


def test_the_same_seed_draws_the_same_and_another_other():
    models = [adapted(seed=seed) for seed in (1, 1, 2)]
    choices, states = [drawn(model)[0] for model in models], [model.module.state_dict() for model in models]
    assert choices[0] == choices[1] != choices[2]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_attaching_changes_no_output_and_training_moves_all_that_was_drawn_alone(kind):
    model = adapted(kind)
    assert torch.equal(outputs(model.module), outputs(tiny(kind)))
    before = {name: value.clone() for name, value in model.module.state_dict().items()}
    names = {name for name, value in model.module.named_parameters() if value.requires_grad}
    mw.apply(model, BRIEF, data=TEXT)
    moved = {name for name, value in model.module.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == names


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft's, in from_pretrained
def test_what_is_saved_is_what_was_drawn_and_it_loads(tmp_path):
    model = adapted()
    mw.apply(model, BRIEF, data=TEXT)
    model.save(tmp_path / "one")
    from safetensors.torch import load_file

    stored = load_file(tmp_path / "one" / "adapter_model.safetensors")
    assert sum(value.numel() for value in stored.values()) == trained(model)
    assert not (tmp_path / "one" / "model.safetensors").exists()
    loaded = peft.PeftModel.from_pretrained(tiny(), str(tmp_path / "one")).eval()
    assert torch.allclose(outputs(loaded), outputs(model.module), atol=1e-6)


def test_whole_tensors_of_the_base_and_low_rank_updates_fold_and_bottlenecks_do_not():
    model = adapted("gpt2", kinds=("low-rank", "weight", "bias"))
    mw.apply(model, BRIEF, data=TEXT)
    expected = outputs(model.module)
    mw.apply(model, Fold())
    assert torch.allclose(outputs(model.module), expected, atol=1e-5)
    with pytest.raises(ValueError, match="is no change of a weight"):
        mw.apply(adapted(kinds=("bottleneck",)), Fold())


def test_a_whole_weight_trains_as_the_weight_itself():
    model = adapted(kinds=("weight",), parameters=2 * 64 * 64, where="attn.q", seed=0)
    (path,) = [path for path, kinds in drawn(model)[0].items() if kinds]
    mw.apply(model, BRIEF, data=TEXT)
    plain = lettered()
    for name, value in plain.module.named_parameters():
        value.requires_grad_(name == f"{path}.weight")
    mw.apply(plain, BRIEF, data=TEXT)
    assert torch.allclose(outputs(model.module), outputs(plain.module), atol=1e-4)
    assert not torch.allclose(outputs(model.module), outputs(tiny()), atol=1e-3)


def test_the_plan_draws_what_the_step_draws():
    from modelwright.core.given import Given
    from modelwright.core.model import emptied

    method = Apet(parameters=60_000, inner=8)
    planned, _ = plan.predict(emptied(lettered().module), method, Given())
    assert stored_bytes(planned) == stored_bytes(mw.apply(lettered(), method).module)


def test_what_cannot_be_is_refused():
    with pytest.raises(SettingError, match="kinds and drawn are some of low-rank, bottleneck, weight, bias; got prompt"):
        Apet(kinds=("prompt",))
    with pytest.raises(SettingError, match="got none"):
        Apet(kinds=())
    with pytest.raises(ModelError, match=r"half of 100 parameters holds nothing; the smallest of 84 groups has .* Give more"):
        adapted(parameters=100)
    with pytest.raises(SettingError, match="parameters is one budget for all layers"):
        adapted(parameters={"attn": 10_000, "mlp": 20_000})

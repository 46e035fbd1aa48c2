"""Light-PEFT: what a short run says is needed of a model and its adapter stays."""

import copy

import pytest
import torch
from calibration import TEXT, lettered, normal
from tiny import outputs, tiny, tiny_inputs

import modelwright as mw
from modelwright.anatomy import anatomy_of
from modelwright.core import adapters
from modelwright.core.errors import ModelError, PlanError
from modelwright.core.model import unwrapped
from modelwright.core.training import Training, train
from modelwright.methods.adapt.hydra import Hydra
from modelwright.methods.adapt.light_peft import Estimating, LightPeft
from modelwright.methods.adapt.lora import Lora
from modelwright.methods.train import Train

BRIEF = Train(tokens=256, batch=4, length=16, learning_rate=1e-2)
SHORT = dict(tokens=512, batch=4, length=16, learning_rate=1e-2)
NONE = dict(heads=0.0, neurons=0.0, updates=0.0, ranks=0.0)
IDS = torch.randint(0, 90, (600,), generator=torch.Generator().manual_seed(3))
RUN = Training(tokens=12 * 64, batch=4, length=16, learning_rate=1e-2, save_every=5)


def adapted(kind="llama", folder=None, **settings):
    model = lettered(kind)
    if folder is not None:
        model.save(folder)
        model = mw.open(folder)
    mw.apply(model, Lora(**{"rank": 4, "alpha": 12, "where": ("attn", "mlp"), **settings}))
    with torch.no_grad():
        for number, (name, value) in enumerate(model.module.named_parameters()):
            if "lora_B" in name:
                value.copy_(0.1 * normal(*value.shape, seed=number))
    return model


def loras(model):
    return {path: layer for path, layer in unwrapped(model.module).named_modules() if hasattr(layer, "lora_A")}


def course(model, steps=12, **settings):
    return Estimating(LightPeft(**settings), unwrapped(model.module), steps, [])


def test_what_stays_by_hand():
    # Of 3 updates of rank 2 the one that weighs least goes with 1/3; of the 4 ranks of the others half, the lowest two: both of "b".
    method = LightPeft(updates=0.34, ranks=0.5)
    ranks = {"a": torch.tensor([9.0, 9]), "b": torch.tensor([0.1, 0.2]), "c": torch.tensor([0.3, 5])}
    assert method.left(torch.tensor([0.1, 0.5, 0.9]), ranks) == {"a": [], "b": [], "c": [0, 1]}
    assert method.left(torch.tensor([0.9, 0.1, 0.5]), ranks) == {"a": [0, 1], "b": [], "c": []}
    assert LightPeft(updates=0.0, ranks=0.0).left(torch.zeros(3), ranks) == {"a": [0, 1], "b": [0, 1], "c": [0, 1]}


def test_an_update_weighs_by_its_outputs_beside_the_layers_own_and_a_rank_by_its_gradient():
    model = adapted(rank=2)
    found = course(model)
    found.start()
    found.begin(7)
    layer, inputs = unwrapped(model.module).model.layers[1].mlp.up_proj, normal(5, 64)
    place = list(found.ranks).index("model.layers.1.mlp.up_proj")
    layer(inputs).square().sum().backward()
    down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    own = layer.base_layer(inputs)
    ratio = (inputs @ down.T @ up.T * 6).norm(dim=-1) / own.norm(dim=-1)
    assert found.weighs[place].item() == pytest.approx(ratio.mean().item(), rel=1e-4)
    found.penalty().backward()
    for path, other in found.bearers.items():
        if path != "model.layers.1.mlp.up_proj":
            for value in adapters.factors_of(other):
                value.grad = torch.zeros_like(value)
    found.gradient(7)
    expected = [(down[j] * down.grad[j]).mean().abs() + (up[:, j] * up.grad[:, j]).mean().abs() for j in range(2)]
    assert found.ranks["model.layers.1.mlp.up_proj"].tolist() == pytest.approx([value.item() for value in expected], rel=1e-4)
    assert all((mask.grad == 1e-4).all() for mask in found.masks)  # λ · sign(1)
    found.leave()


def test_only_the_second_half_of_the_run_counts():
    model = adapted()
    found = course(model)
    found.start()
    for step in (0, 5, 6):
        found.begin(step)
        outputs(model.module)
        assert bool(found.weighs.any()) is (step == 6)
    found.leave()


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt"])
def test_masks_of_zero_and_one_are_units_that_left(kind):
    model, inputs = adapted(kind), tiny_inputs(tiny(kind))
    found = course(model, heads=0.5, neurons=0.25)
    found.start()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for mask in found.masks:
            mask.copy_(torch.rand(len(mask), generator=generator))
        kept = found.method.stays(found.found, found.masks)
        for mask, rows in zip(found.masks, kept, strict=True):
            mask.zero_()[rows] = 1
    expected, plain = outputs(model.module, inputs), None
    found.leave()
    plain = outputs(model.module, inputs)
    adapters.shrink(unwrapped(model.module), found.found, kept, {path: list(range(4)) for path in found.ranks})
    assert (outputs(model.module, inputs) - expected).abs().max() < 1e-5
    assert (plain - expected).abs().max() > 1e-3


def test_updates_and_ranks_that_left_are_zeros_in_their_factors():
    model, silent = adapted(), adapted()
    ranks = {path: [place for place in range(4) if (place + number) % 3] if number % 2 else [] for number, path in enumerate(loras(model))}
    adapters.shrink(unwrapped(model.module), [], [], ranks)
    for path, layer in loras(silent).items():
        for place in set(range(4)) - set(ranks[path]):
            layer.lora_B["default"].weight.data[:, place] = 0
    assert torch.allclose(outputs(model.module), outputs(silent.module), atol=1e-5)
    assert {path: layer.r["default"] for path, layer in loras(model).items()} == {path: len(own) for path, own in ranks.items() if own}


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_as_much_goes_as_was_asked(kind):
    model, whole = adapted(kind), adapted(kind)
    mw.apply(model, LightPeft(heads=0.5, neurons=0.25, updates=0.5, ranks=0.25, **SHORT), data=TEXT)
    before, after = anatomy_of(tiny(kind)), unwrapped(model.module)
    with adapters.plain_layers(after):
        for units, old in zip(before.units(after, "heads"), before.units(tiny(kind), "heads"), strict=True):
            assert units.count == old.count - old.count // 2  # of each block
        neurons = [sum(units.count for units in before.units(module, "mlp")) for module in (tiny(kind), after)]
    assert neurons[1] == neurons[0] - neurons[0] // 4
    updates = len(loras(whole)) - len(loras(whole)) // 2
    ranks = [layer.r["default"] for layer in loras(model).values()]
    assert len(ranks) <= updates  # one without ranks is gone too
    assert sum(ranks) == 4 * updates - 4 * updates // 4
    assert sum(value.numel() for value in model.module.parameters()) < sum(value.numel() for value in whole.module.parameters())


def test_with_nothing_to_go_it_is_plain_training_and_so_is_what_follows():
    one, two = adapted(), adapted()
    mw.apply(one, LightPeft(**NONE, **SHORT), data=TEXT)
    mw.apply(two, Train(**SHORT), data=TEXT)
    assert torch.equal(outputs(one.module), outputs(two.module))
    mw.apply(one, BRIEF, data=TEXT)
    mw.apply(two, BRIEF, data=TEXT)
    assert torch.equal(outputs(one.module), outputs(two.module))


def test_masks_are_forgotten_and_base_weights_that_stay_are_the_same_bits():
    model, found = adapted(), {}
    mw.apply(model, LightPeft(heads=0.5, neurons=0.25, l1=1.0, **SHORT), data=TEXT)
    base = unwrapped(model.module)
    kept = base.config.units_kept
    for depth in range(4):
        rows = kept["mlp"][anatomy_of(tiny()).units(tiny(), "mlp")[depth].scope]
        layer = base.model.layers[depth].mlp.up_proj
        found[depth] = getattr(layer, "base_layer", layer).weight
        assert torch.equal(found[depth], tiny().model.layers[depth].mlp.up_proj.weight[rows])
    assert not any("mask" in name for name in model.module.state_dict())
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in loras(model).values())


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft's, in from_pretrained
def test_it_is_trained_on_stored_with_its_base_and_loads(tmp_path):
    model = adapted(folder=tmp_path / "plain")
    mw.apply(model, LightPeft(heads=0.5, neurons=0.25, **SHORT), data=TEXT)
    before = outputs(model.module)
    mw.apply(model, BRIEF, data=TEXT)
    assert not torch.equal(outputs(model.module), before)
    model.save(tmp_path / "out")
    again = mw.open(tmp_path / "out")
    assert torch.allclose(outputs(again.module), outputs(model.module), atol=1e-6)
    assert {path: layer.r for path, layer in loras(again).items()} == {path: layer.r for path, layer in loras(model).items()}
    assert unwrapped(again.module).config.units_kept == unwrapped(model.module).config.units_kept


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_adapter_goes_onto_the_original_with_zeros_where_units_were(kind):
    model = adapted(kind)
    mw.apply(model, [LightPeft(heads=0.5, neurons=0.25, updates=0.25, **SHORT), BRIEF], data=TEXT)
    original = tiny(kind)
    kept = unwrapped(model.module).config.units_kept
    silent = copy.deepcopy(original)
    for way in ("heads", "mlp"):
        for units in anatomy_of(silent).units(silent, way):
            span = next(span for span in units.spans if span.output)
            part = silent.get_parameter(span.name).data.narrow(span.dim, span.start, units.count * span.width).movedim(span.dim, 0)
            gone = torch.ones(units.count, dtype=torch.bool)
            gone[kept[way][units.scope]] = False
            part[gone.repeat_interleave(span.width)] = 0
    inputs = tiny_inputs(original)
    on_silent = adapters.restored(model, silent)
    assert (outputs(on_silent, inputs) - outputs(model.module, inputs)).abs().max() < 1e-5
    whole = adapters.restored(model, original)
    assert (outputs(whole, inputs) - outputs(tiny(kind), inputs)).abs().max() > 1e-3
    grown = [value for name, value in whole.named_parameters() if "lora_B" in name and ("up_proj" in name or "c_fc" in name)]
    assert all((value == 0).all(1).any() for value in grown)


def test_twice_the_lists_are_of_the_first_model():
    model = adapted()
    mw.apply(model, [LightPeft(heads=0.0, neurons=0.25, updates=0.0, ranks=0.0, **SHORT)] * 2, data=TEXT)
    rows = unwrapped(model.module).config.units_kept["mlp"]["model.layers.2.mlp"]
    layer = unwrapped(model.module).model.layers[2].mlp.up_proj
    assert torch.equal(layer.base_layer.weight, tiny().model.layers[2].mlp.up_proj.weight[rows])


@pytest.mark.parametrize("last", [6, 8])
def test_a_run_that_was_broken_off_ends_with_the_same_bits(last, tmp_path):
    def run(model, **others):
        base = unwrapped(model.module)
        train(model.module, IDS, RUN, course=Estimating(LightPeft(), base, RUN.steps, []), **others)
        return model

    def stop(step, total, parts):
        if step == last:
            raise KeyboardInterrupt

    whole = run(adapted())
    with pytest.raises(KeyboardInterrupt):
        run(adapted(), folder=tmp_path, report=stop)
    again = run(adapted(), folder=tmp_path)
    states = [model.module.state_dict() for model in (whole, again)]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_the_plan_knows_what_is_left():
    from modelwright.core.model import emptied, stored_bytes

    model = adapted()
    empty = LightPeft(heads=0.5, neurons=0.25, updates=0.5, ranks=0.0).planned(emptied(copy.deepcopy(model.module)), 0)
    mw.apply(model, LightPeft(heads=0.5, neurons=0.25, updates=0.5, ranks=0.0, **SHORT), data=TEXT)
    assert stored_bytes(empty) == pytest.approx(stored_bytes(model.module), rel=0.05)


def test_models_without_lora_are_refused():
    with pytest.raises(PlanError, match=r"adapt\.light_peft wants a model that is adapters"):
        mw.apply(lettered(), LightPeft(**SHORT), data=TEXT)
    with pytest.raises(ModelError, match="bears no plain LoRA update, or several. Attach adapt.lora alone"):
        mw.apply(mw.apply(lettered(), Hydra()), LightPeft(**SHORT), data=TEXT)

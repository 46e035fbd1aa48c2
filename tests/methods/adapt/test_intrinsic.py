import peft
import pytest
import torch
from calibration import TEXT, lettered, normal, surprise
from safetensors.torch import load_file, save_file
from tiny import outputs, tiny

import modelwright as mw
from modelwright.blocks._part import Layer
from modelwright.blocks.subspace import Coordinates
from modelwright.core import tuners
from modelwright.core.errors import ModelError, SettingError, SiteError
from modelwright.methods.adapt.intrinsic import Intrinsic
from modelwright.methods.train import Train

FORMS = ["dense", "sparse", "fastfood"]
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft's, in from_pretrained


def parts(model):
    return [layer.parts["default"] for layer in model.modules() if isinstance(layer, tuners.Bearer)]


def joined(weight, z, **settings):
    method = Intrinsic(dimension=len(z), layer_scales=settings.pop("layer_scales", False), **settings)
    part, shared = method.part(weight, None), Coordinates(len(z))
    shared.z.data.copy_(z)
    part.join(shared)
    return part


def test_a_case_by_hand():
    # With 2 sparse values of a 2 × 2 weight each column of P has √4 = 2 entries of ±1/√2, one in each row of the weight.
    weight = torch.zeros(2, 2)
    part = joined(weight, torch.tensor([3.0, 0.0]), form="sparse", layer_scales=True)
    part.scale.data.fill_(2.0)
    change = part.merged(weight, None)[0]
    assert torch.allclose(change.abs().amax(1), torch.tensor([6.0, 6.0]) / 2**0.5)
    assert change.count_nonzero() == 2


@pytest.mark.parametrize("form", FORMS)
def test_attaching_changes_no_output_and_gives_a_gradient(form):
    model = mw.apply(lettered(), Intrinsic(dimension=64, form=form))
    assert torch.equal(outputs(model.module), outputs(tiny()))
    ids = torch.tensor([model.tokenizer(TEXT[0])["input_ids"][:64]])
    with torch.enable_grad():
        model.module(input_ids=ids, labels=ids).loss.backward()
    (z,) = {part.shared.z for part in parts(model.module)}
    assert z.grad.count_nonzero() == len(z)


@pytest.mark.parametrize("form", FORMS)
def test_what_trains_is_as_many_numbers_as_the_dimension(form):
    for scales in (True, False):
        model = mw.apply(mw.open(tiny()), Intrinsic(dimension=80, form=form, layer_scales=scales)).module
        assert sum(value.numel() for value in model.parameters() if value.requires_grad) == 80
        found = parts(model)
        assert len(found) == 4 * 7
        assert {len(part.shared.z) for part in found} == {80 - len(found) * scales}
        assert len({int(part.seed) for part in found}) == len(found)  # each weight has a map of its own


def test_with_as_many_dense_numbers_as_entries_every_weight_is_reached():
    weight, target = normal(3, 4), normal(3, 4, seed=1)
    part = joined(weight, torch.zeros(12), form="dense")
    part.shared.z.data.copy_(torch.linalg.solve(part.drawn()[0], (target - weight).flatten()))
    assert torch.allclose(part.merged(weight, None)[0], target, atol=1e-3)


@pytest.mark.parametrize("form", FORMS)
def test_a_scalar_multiplies_a_layers_change(form):
    weight, x = normal(6, 5), normal(3, 5, seed=2)
    layer = torch.nn.Linear(5, 6)
    part = joined(weight, normal(9, seed=1), form=form, layer_scales=True)
    one = part(x, Layer.plain(layer)) - layer(x)
    part.scale.data.fill_(-3.0)
    assert torch.allclose(part(x, Layer.plain(layer)) - layer(x), -3 * one, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_seed_and_values_alone_give_the_same_weights_bit_for_bit(form, tmp_path):
    train = Train(tokens=1024, batch=4, length=32, learning_rate=1e-1)
    model = mw.apply(lettered(), [Intrinsic(dimension=64, form=form), train], data=TEXT)
    model.save(tmp_path / "one")
    stored = load_file(tmp_path / "one" / "adapter_model.safetensors")
    assert sum(value.numel() for value in stored.values()) == 64 + 2 * 28  # and for each weight a seed and a fingerprint
    loaded = peft.PeftModel.from_pretrained(tiny(), str(tmp_path / "one")).merge_and_unload()
    folded = model.module.merge_and_unload()
    assert all(torch.equal(value, folded.state_dict()[name]) for name, value in loaded.state_dict().items())
    assert not torch.equal(folded.model.layers[0].mlp.up_proj.weight, tiny().model.layers[0].mlp.up_proj.weight)


def test_another_way_to_draw_is_refused(tmp_path):
    model = mw.apply(mw.open(tiny()), Intrinsic(dimension=64))
    model.save(tmp_path / "one")
    file = tmp_path / "one" / "adapter_model.safetensors"
    stored = load_file(file)
    save_file({name: value + 1 if name.endswith("drawn_as") else value for name, value in stored.items()}, file, {"format": "pt"})
    loaded = peft.PeftModel.from_pretrained(tiny(), str(tmp_path / "one")).eval()
    with pytest.raises(ModelError, match="draws other random numbers"):
        outputs(loaded)


@pytest.mark.slow
def test_training_lowers_the_loss():
    model = mw.apply(lettered(), [Intrinsic(dimension=500)])
    before = surprise(model)
    mw.apply(model, Train(tokens=4096, batch=4, length=32, learning_rate=1e-1), data=TEXT)
    assert surprise(model) < before


def test_bad_settings_are_refused():
    with pytest.raises(SettingError, match="nothing is left beside a scalar for each of 28 layers"):
        mw.apply(tiny(), Intrinsic(dimension=28))
    with pytest.raises(SiteError, match="fewer than the dimension 20,000"):
        mw.apply(tiny(), Intrinsic())
    for settings in ({"form": "hadamard"}, {"dimension": 0}):
        with pytest.raises(SettingError, match=next(iter(settings))):
            Intrinsic(**settings)

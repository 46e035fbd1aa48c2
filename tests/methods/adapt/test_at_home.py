"""What every adapter of ours does in peft, for users who never heard of anything but one import."""

import copy
import json

import peft
import pytest
import torch
from tiny import outputs, tiny

import modelwright
from modelwright.core import contract, find, tuners
from modelwright.core.errors import ModelError, ModelwrightError, SettingError
from modelwright.core.method import LayerAdapter

OURS = [name for name in find.names() if name.startswith("adapt.") and issubclass(find.find(name), LayerAdapter)]
LAYERS = {"llama": ["q_proj", "down_proj"], "gpt2": ["c_attn", "c_fc"]}
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),  # peft's, in from_pretrained
    pytest.mark.filterwarnings("ignore:.*gains one:UserWarning"),  # a bias, which its own test looks at
    pytest.mark.filterwarnings("ignore:.*Already found a `peft_config`:UserWarning"),
]


def config(name, kind="llama", **others):
    method = find.find(name)
    settings = {key: value for key, value in method.small.items() if key not in ("where", "skip")}
    if hasattr(method, "sources"):
        settings["sources"] = contract.sources(tiny(kind))
    return tuners.config_class(method)(**{"target_modules": LAYERS[kind], **settings, **others})


def moved(model, seed=0):
    """The model with all that its adapters train a little away from where it began."""
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in model.parameters():
            if value.requires_grad:
                value.add_(0.05 * torch.randn(value.shape, generator=random))
    return model.eval()


def bearers(model):
    return [layer for layer in model.modules() if isinstance(layer, tuners.Bearer)]


def parted(name):
    """Whether the adapter can be put into weights."""
    return all(part.mergeable for layer in bearers(peft.get_peft_model(tiny(), config(name))) for part in layer.parts.values())


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("name", OURS)
def test_peft_saves_loads_disables_and_switches(name, kind, tmp_path):
    before = outputs(tiny(kind))
    model = moved(peft.get_peft_model(tiny(kind), config(name, kind)))
    assert sum(value.requires_grad for value in model.parameters()) == sum(
        value.requires_grad for key, value in model.named_parameters() if "_parts." in key or "_shared." in key
    )
    first = outputs(model)
    assert not torch.equal(first, before)
    with model.disable_adapter():
        assert torch.equal(outputs(model), before)
    model.save_pretrained(str(tmp_path / "one"))
    stated = json.loads((tmp_path / "one" / "adapter_config.json").read_text())
    assert stated["peft_type"] == tuners.type_name(find.find(name))
    for called in ("default", "second"):
        loaded = peft.PeftModel.from_pretrained(tiny(kind), str(tmp_path / "one"), adapter_name=called).eval()
        assert torch.allclose(outputs(loaded), first, atol=1e-6)
    model.add_adapter("other", config(name, kind))
    model.set_adapter("other")
    second = outputs(moved(model, seed=1))
    assert not torch.equal(second, first)
    model.set_adapter("default")
    assert torch.equal(outputs(model), first)
    model.delete_adapter("other")
    assert torch.equal(outputs(model), first)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("name", OURS)
def test_what_can_be_merged_gives_the_same_merged_and_comes_apart_bit_for_bit(name, kind):
    if not parted(name):
        with pytest.raises(ValueError, match="is no change of a weight"):
            peft.get_peft_model(tiny(), config(name)).merge_adapter()
        return
    model = moved(peft.get_peft_model(tiny(kind), config(name, kind)))
    apart, weights = outputs(model), copy.deepcopy([layer.get_base_layer().state_dict() for layer in bearers(model)])
    model.merge_adapter()
    assert (outputs(model) - apart).abs().max() < 1e-4
    model.unmerge_adapter()
    for layer, before in zip(bearers(model), weights, strict=True):
        after = layer.get_base_layer().state_dict()
        assert before.keys() == after.keys()
        assert all(torch.equal(before[key], after[key]) for key in before)
    changes = [layer.get_delta_weight("default") for layer in bearers(model)]
    own = [layer.get_base_layer().weight.detach().clone() for layer in bearers(model)]
    merged = model.merge_and_unload()
    assert (outputs(merged) - apart).abs().max() < 1e-4
    after = [module.weight for path, module in merged.named_modules() if path.endswith(tuple(LAYERS[kind]))]
    for change, start, end in zip(changes, own, after, strict=True):
        assert torch.allclose(start + change, end, atol=1e-5)


@pytest.mark.parametrize("name", OURS)
def test_exact_factors_are_the_whole_change(name):
    model = moved(peft.get_peft_model(tiny(), config(name)))
    for layer in bearers(model):
        factors = layer.parts["default"].factors()
        if factors is not None:
            up, down = factors
            assert torch.allclose(up @ down, layer.get_delta_weight("default"), atol=1e-5)


@pytest.mark.parametrize("name", OURS)
def test_gradients_are_those_of_finite_differences_in_float64(name):
    model = moved(peft.get_peft_model(tiny(), config(name, target_modules=["q_proj"]))).double()  # its norms are in float32, so one layer
    layer, random = bearers(model)[0], torch.Generator().manual_seed(0)
    x = torch.randn(3, 64, generator=random, dtype=torch.float64)
    shared = [value for key, value in model.named_parameters() if "_shared." in key]
    trained = [value for value in (*layer.parameters(), *shared) if value.requires_grad]

    def loss():
        return layer(x).square().mean()

    gradients = torch.autograd.grad(loss(), trained)
    directions = [torch.randn(value.shape, generator=random, dtype=torch.float64) for value in trained]
    slope = sum((gradient * direction).sum() for gradient, direction in zip(gradients, directions, strict=True))
    ends = []
    for step in (1e-5, -1e-5):
        with torch.no_grad():
            for value, direction in zip(trained, directions, strict=True):
                value.add_(step * direction)
            ends.append(loss())
            for value, direction in zip(trained, directions, strict=True):
                value.sub_(step * direction)
    assert torch.allclose(slope, (ends[0] - ends[1]) / 2e-5, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("name", OURS)
def test_an_adapter_of_other_weights_is_refused(name, tmp_path):
    peft.get_peft_model(tiny(), config(name)).save_pretrained(str(tmp_path / "one"))
    with pytest.raises(ModelError, match=r"made on other weights than the model's\. Load it on"):
        peft.PeftModel.from_pretrained(tiny(seed=3), str(tmp_path / "one"))


def test_settings_of_a_config_are_checked():
    with pytest.raises(SettingError, match=r"adapt\.hydra: `?parallel"):
        config("adapt.hydra", parallel=-1)


def test_layers_may_have_settings_of_their_own(tmp_path):
    model = modelwright.open(tiny())
    modelwright.apply(model, find.find("adapt.hydra")(parallel={"attn.q": 2, "mlp.*": [1, 2, 3, 4]}, sequential=0))
    ranks = {path: layer.parts["default"].update.down.shape[0] for path, layer in model.module.get_base_model().named_modules()
             if isinstance(layer, tuners.Bearer)}  # fmt: skip
    assert {rank for path, rank in ranks.items() if "q_proj" in path} == {2}
    assert [ranks[f"model.layers.{depth}.mlp.up_proj"] for depth in range(4)] == [1, 2, 3, 4]
    assert not [path for path in ranks if "k_proj" in path]
    moved(model.module).save_pretrained(str(tmp_path / "one"))
    loaded = peft.PeftModel.from_pretrained(tiny(), str(tmp_path / "one")).eval()
    assert torch.allclose(outputs(loaded), outputs(model.module), atol=1e-6)


@pytest.mark.parametrize(("name", "setting"), [
    ("hydra", "parallel"), ("hydra", "sequential"), ("triadapt", "rank"), ("petalface", "rank"), ("prompt_lora", "rank"), ("pst", "rank"),
    ("dsee", "rank"),
])  # fmt: skip
def test_a_rank_above_the_layers_is_refused(name, setting):
    with pytest.raises(ModelwrightError, match=r"is 64 × 64, and cannot have the rank 65\. Give a rank of at most 64"):
        modelwright.apply(modelwright.open(tiny()), find.find(f"adapt.{name}")(**{setting: 65}, where="attn.q"))


def test_a_config_from_a_file_makes_no_adapter_out_of_nothing(tmp_path):
    moved(peft.get_peft_model(tiny(), config("adapt.hydra"))).save_pretrained(str(tmp_path / "one"))
    hollow = peft.get_peft_model(tiny(), peft.PeftConfig.from_pretrained(str(tmp_path / "one")))
    with pytest.raises(ModelError, match=r"values of the adapter 'default' were not loaded"):
        outputs(hollow)
    loaded = peft.PeftModel.from_pretrained(tiny(), str(tmp_path / "one")).eval()
    loaded.add_adapter("second", loaded.peft_config["default"])
    loaded.set_adapter("second")
    assert torch.equal(outputs(loaded), outputs(tiny()))  # it begins anew


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_an_adapter_made_in_32_bits_goes_on_the_same_model_in_16(dtype, tmp_path):
    peft.get_peft_model(tiny(), config("adapt.svfit")).save_pretrained(str(tmp_path / "one"))
    loaded = peft.PeftModel.from_pretrained(tiny().to(dtype), str(tmp_path / "one"))
    assert outputs(loaded).dtype == dtype

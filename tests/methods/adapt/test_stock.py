"""Adapters that peft has, by our words: what peft is told, and that it does it."""

import json

import peft
import pytest
import torch
from calibration import TEXT, lettered
from killing import straight_and_resumed
from tiny import outputs, tiny

import modelwright as mw
from modelwright.core import find
from modelwright.core.errors import SettingError, SiteError
from modelwright.core.training import Training
from modelwright.core.tuners import course_of
from modelwright.methods.adapt._mechanism import StockAdapter
from modelwright.methods.train import Train

OURS = {name: find.find(name) for name in find.names() if name.startswith("adapt.")}
STOCK = {
    name: method for name, method in OURS.items() if issubclass(method, StockAdapter) and name != "adapt.lora_ga"
}  # which changes the base
BRIEF = Train(tokens=256, batch=4, length=16, learning_rate=1e-2)
pytestmark = [  # peft's
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The following rank_pattern keys did not match:RuntimeWarning"),  # of AdaLoRA's own pattern
    pytest.mark.filterwarnings("ignore:Failed to load the CUDA extension:UserWarning"),
    pytest.mark.filterwarnings("ignore:Setting boft_n_butterfly_factor to 1:UserWarning"),
]


def small(name, **others):
    return STOCK[name](**{**STOCK[name].small, **others})


FEW = ("adapt.lora", "adapt.dora", "adapt.adalora", "adapt.ia3", "adapt.miss", "adapt.vera")
TRAINED = [name if name in FEW else pytest.param(name, marks=pytest.mark.slow) for name in STOCK]


@pytest.mark.parametrize("name", TRAINED)
def test_it_trains_and_plain_peft_loads_it(name, tmp_path):
    model = lettered()
    mw.apply(model, [small(name), BRIEF], data=TEXT)
    trained = outputs(model.module)
    assert not torch.allclose(trained, outputs(tiny()), atol=1e-3)
    model.save(tmp_path / "adapter")
    stated = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    config = getattr(peft, STOCK[name].config)
    assert stated["peft_type"] == config().peft_type.value if name != "adapt.adalora" else "ADALORA"
    plain = peft.PeftModel.from_pretrained(tiny(), str(tmp_path / "adapter")).eval()
    assert torch.allclose(outputs(plain), trained, atol=1e-5)


@pytest.mark.parametrize(
    "name", [name for name, method in STOCK.items() if method.neutral is None and name not in ("adapt.vblora", "adapt.unilora")]
)
def test_what_is_only_rounded_at_first_changes_nothing_else(name):
    model = mw.apply(mw.open(tiny()), small(name))
    assert torch.allclose(outputs(model.module), outputs(tiny()), atol=1e-4)


@pytest.mark.parametrize("name", STOCK)
def test_every_setting_is_one_of_pefts(name):
    method = STOCK[name]
    known = set(getattr(peft, method.config).__dataclass_fields__)
    told = (
        {method.calls.get(own, own) for own in method.own() if own not in method.apart} | set(method.fixed) | set(method.patterns.values())
    )
    assert told <= known


def ranks(model, ending):
    layers = {path: layer for path, layer in model.module.get_base_model().named_modules() if path.endswith(ending)}
    return [layer.lora_A["default"].weight.shape[0] for layer in layers.values()]


@pytest.mark.parametrize("name", ["adapt.lora", "adapt.dora"])
def test_ranks_differ_by_depth_and_by_role(name):
    model = mw.apply(mw.open(tiny()), STOCK[name](rank={"attn.*": [1, 2, 3, 4], "mlp.*": 5}))
    assert ranks(model, "q_proj") == [1, 2, 3, 4]
    assert ranks(model, "up_proj") == [5] * 4


def test_what_peft_takes_once_for_all_layers_is_refused_by_place():
    with pytest.raises(SettingError, match=r"adapt\.vera: rank differs from layer to layer, and peft takes one for all"):
        mw.apply(mw.open(tiny()), STOCK["adapt.vera"](rank=[4, 4, 8, 8]))


@pytest.mark.parametrize(("name", "settings", "sentence"), [
    ("adapt.lora", {"rank": 65}, "is 64 × 64, and cannot have the rank 65. Give a rank of at most 64"),
    ("adapt.oft", {"group": 48}, "has 64 numbers along a side, which group 48 does not divide"),
    ("adapt.miss", {"rank": 7, "variant": "bat"}, "which blocks of 7 do not divide"),
    ("adapt.miss", {"rank": 8, "variant": "mini", "narrow": 7}, "which 7 columns do not divide"),
    ("adapt.fourierft", {"frequencies": 5000}, "has 4,096 entries, and frequencies asks for 5,000"),
    ("adapt.gralora", {"rank": 7}, "has 7 numbers along a side, which grid 2 does not divide"),
])  # fmt: skip
def test_what_does_not_fit_is_refused_before_work(name, settings, sentence):
    with pytest.raises(SiteError, match=sentence):
        mw.apply(mw.open(tiny()), STOCK[name](where="attn.q", **settings))


def test_miss_is_lora_with_a_fixed_folding():
    # A_jc = 1 where c mod rank is j, B = Dᵀ: the card's equality, at rank 8.
    model = mw.apply(mw.open(tiny()), STOCK["adapt.miss"](rank=8, where="mlp.up"))
    layer = model.module.get_base_model().model.layers[0].mlp.up_proj
    with torch.no_grad():
        layer.miss_block["default"].normal_(generator=torch.Generator().manual_seed(0))
    folding = torch.eye(8).repeat(1, 64 // 8)
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(1))
    expected = layer.base_layer(x) + x @ folding.T @ layer.miss_block["default"]
    assert torch.allclose(layer(x), expected, atol=1e-5)
    assert layer.miss_block["default"].numel() == 8 * 160  # rank · out


@pytest.mark.parametrize(("variant", "count"), [("balanced", 8 * 160), ("bat", 8 * 160), ("mini", 8 * 4)])
def test_the_numbers_of_miss_are_those_of_its_formulas(variant, count):
    model = mw.apply(mw.open(tiny()), STOCK["adapt.miss"](rank=8, variant=variant, narrow=4, where="mlp.up"))
    blocks = [value.numel() for path, value in model.module.named_parameters() if "miss_block" in path]
    assert blocks == [count] * 4


def test_a_block_affine_update_of_zeros_is_the_tiled_block():
    module = tiny()
    with torch.no_grad():
        module.model.layers[0].mlp.up_proj.weight.zero_()
    layer = (
        mw.apply(mw.open(module), STOCK["adapt.miss"](rank=8, variant="bat", where="mlp.up"))
        .module.get_base_model()
        .model.layers[0]
        .mlp.up_proj
    )
    with torch.no_grad():
        layer.miss_block["default"].normal_(generator=torch.Generator().manual_seed(0))
    tiles = layer.miss_block["default"]  # [out / rank, rank, rank]
    assert torch.allclose(layer.get_delta_weight("default", layer.base_layer.weight), tiles.reshape(160, 8).repeat(1, 8), atol=1e-6)


def test_ia3_scales_what_matrices_into_the_stream_are_given():
    layer = mw.apply(mw.open(tiny()), STOCK["adapt.ia3"]()).module.get_base_model().model.layers[0]
    assert layer.mlp.down_proj.ia3_l["default"].shape == (1, 160)
    assert layer.self_attn.k_proj.ia3_l["default"].shape == (32, 1)
    assert not hasattr(layer.mlp.up_proj, "ia3_l")


def test_adaloras_ranks_fall_to_their_mean_within_the_run():
    model = lettered()
    method = STOCK["adapt.adalora"](rank=2, initial=4, begin=0.1, end=0.6, every=1)
    mw.apply(model, [method, Train(tokens=20 * 64, batch=4, length=16, learning_rate=1e-2)], data=TEXT)
    config = model.module.peft_config["default"]
    assert (config.total_step, config.tinit, config.tfinal) == (20, 2, 8)
    kept = sum(int(value.count_nonzero()) for path, value in model.module.named_parameters() if "lora_E" in path)
    layers = sum("lora_E" in path for path, _ in model.module.named_parameters())
    assert kept <= 2 * layers < 4 * layers
    assert len(set(map(sum, config.rank_pattern.values()))) > 1  # which differ from layer to layer


@pytest.mark.parametrize("last", [pytest.param(4, marks=pytest.mark.slow), 11])
def test_an_adalora_run_that_was_killed_ends_with_the_same_bits(tmp_path, last):
    ids = torch.tensor(lettered().tokenizer(TEXT[0])["input_ids"])
    settings = Training(tokens=12 * 32, batch=2, length=16, save_every=1, learning_rate=1e-2)

    def made():
        model = mw.apply(lettered(), STOCK["adapt.adalora"](rank=2, initial=4, begin=0.1, end=0.7, every=1)).module
        return model, course_of(model, settings.steps, 0)

    straight, resumed = straight_and_resumed(made, ids, settings, tmp_path, last)
    own = dict(resumed.named_parameters())
    assert all(torch.equal(value, own[name]) for name, value in straight.named_parameters())
    assert straight.peft_config["default"].rank_pattern == resumed.peft_config["default"].rank_pattern

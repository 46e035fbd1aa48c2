import copy
import warnings

import peft
import pytest
import torch
from calibration import TEXT, lettered
from nets import ResNet
from tiny import outputs, tiny
from torch import nn
from transformers import AutoModelForCausalLM

import modelwright as mw
from modelwright.core.errors import ModelError
from modelwright.core.tuners import Bearer, config_class
from modelwright.methods.adapt.fold import Fold
from modelwright.methods.adapt.ssf import Ssf
from modelwright.methods.quantize.rtn import Rtn
from modelwright.methods.train import Train

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft's, in get_peft_model
BRIEF = Train(tokens=256, batch=4, length=16, learning_rate=1e-2)


def adapted(kind="llama", **settings):
    """A model with scales and shifts that are not what they begin as."""
    torch.manual_seed(0)
    return mw.apply(mw.open(tiny(kind) if isinstance(kind, str) else kind), Ssf(**{"noise": 0.1, **settings}))


def bearers(model):
    return {path: layer for path, layer in model.module.get_base_model().named_modules() if isinstance(layer, Bearer)}


def test_a_case_by_hand():
    # W = [[1, 2], [3, 4]] and b = (1, 0) give y = (4, 7) for x = (1, 1). γ = (2, -1), β = (10, 20): y' = (18, 13).
    # W' = [[2, 4], [-3, -4]] and b' = (2·1 + 10, -1·0 + 20) = (12, 20).
    base = nn.Linear(2, 2)
    with torch.no_grad():
        base.weight.copy_(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
        base.bias.copy_(torch.tensor([1.0, 0.0]))
    layer = peft.get_peft_model(nn.Sequential(base), config_class(Ssf)(target_modules=["0"])).base_model.model[0]
    part = layer.parts["default"]
    with torch.no_grad():
        part.factor.copy_(torch.tensor([2.0, -1.0]))
        part.shift.copy_(torch.tensor([10.0, 20.0]))
        assert torch.equal(layer(torch.ones(1, 2)), torch.tensor([[18.0, 13.0]]))
    layer.merge()
    assert torch.equal(base.weight, torch.tensor([[2.0, 4.0], [-3.0, -4.0]]))
    assert torch.equal(base.bias, torch.tensor([12.0, 20.0]))


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (nn.Linear(6, 4), (3, 6)),
        (nn.Linear(6, 4, bias=False), (3, 6)),
        (nn.Conv1d(6, 4, 3), (2, 6, 9)),
        (nn.Conv2d(6, 4, 3, stride=2, padding=1, bias=False), (2, 6, 9, 9)),
        (nn.Conv2d(6, 6, 3, groups=3), (2, 6, 9, 9)),
        (nn.Conv2d(6, 4, 3), (6, 9, 9)),  # without a batch
        (nn.LayerNorm(6), (2, 5, 6)),
        (nn.LayerNorm(6, bias=False), (2, 5, 6)),
        (nn.RMSNorm(6), (2, 5, 6)),
        (nn.BatchNorm1d(6), (5, 6)),
        (nn.BatchNorm2d(6), (5, 6, 4, 4)),
        (nn.GroupNorm(2, 6), (5, 6, 4, 4)),
        (tiny("gemma").model.norm, (2, 5, 64)),  # multiplies by 1 + weight
        (tiny("llama").model.norm, (2, 5, 64)),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
@pytest.mark.filterwarnings("ignore:.*gains one:UserWarning")
def test_every_kind_of_layer_gives_the_same_merged(module, shape):
    torch.manual_seed(0)
    model = peft.get_peft_model(nn.Sequential(copy.deepcopy(module)).eval(), config_class(Ssf)(target_modules=["0"], noise=0.3)).eval()
    layer, x = model.base_model.model[0], torch.randn(shape)
    part, before = layer.parts["default"], layer.base_layer(x)
    apart = layer(x)
    channels = -1 if isinstance(module, (nn.Linear, nn.LayerNorm, nn.RMSNorm)) or "RMSNorm" in type(module).__name__ else len(shape) - len(
        module.weight.shape[2:] or shape[2:]) - 1  # fmt: skip
    shift = 0 if part.shift is None else part.shift
    assert torch.allclose(apart.movedim(channels, -1), before.movedim(channels, -1) * part.factor + shift, atol=1e-6)
    assert (part.shift is None) == (module.weight.ndim == 1 and getattr(module, "bias", None) is None)
    layer.merge()
    assert not torch.equal(layer.base_layer(x), before)
    assert (layer(x) - apart).abs().max() < 1e-5
    layer.unmerge()
    assert torch.equal(layer.base_layer(x), before)
    assert not hasattr(layer.base_layer, "resized")


def test_two_numbers_train_for_each_channel_and_one_in_norms_without_a_bias():
    model = adapted("llama", noise=0)
    trained = sum(value.numel() for value in model.module.parameters() if value.requires_grad)
    assert trained == 4 * (2 * (64 + 32 + 32 + 64 + 160 + 160 + 64) + 2 * 64) + 64
    model = adapted("vit", where=["attn", "norm"])
    norms = [layer.parts["default"] for path, layer in bearers(model).items() if "norm" in path]
    assert len(norms) == 2 * 4 + 1
    assert all(part.shift is not None for part in norms)


def test_the_authors_beginning_is_near_and_ours_is_there():
    for noise in (0.0, 0.02):
        torch.manual_seed(0)
        model = mw.apply(mw.open(tiny()), Ssf(noise=noise))
        parts = [layer.parts["default"] for layer in bearers(model).values()]
        factors = torch.cat([part.factor for part in parts])
        shifts = torch.cat([part.shift for part in parts if part.shift is not None])
        assert factors.mean().item() == pytest.approx(1, abs=noise / 10)
        assert factors.std().item() == pytest.approx(noise, rel=0.05)
        assert shifts.std().item() == pytest.approx(noise, rel=0.05)


def test_scales_alone_of_keys_values_and_neurons_are_ia3():
    # What enters `down` is act(gate) ⊙ up, so that scaling it is scaling what `up` gives.
    ours = adapted(where=["attn.{k,v}", "mlp.up"], shift=False)
    config = peft.IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"])
    theirs = peft.get_peft_model(tiny(), config).eval()
    layers = dict(theirs.get_base_model().named_modules())
    with torch.no_grad():
        for path, layer in bearers(ours).items():
            scale = layers[path.replace("up_proj", "down_proj")].ia3_l["default"]
            scale.copy_(layer.parts["default"].factor.view_as(scale))
    assert not torch.allclose(outputs(ours.module), outputs(tiny()), atol=1e-3)
    assert torch.allclose(outputs(ours.module), outputs(theirs), atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt2", "vit", "opt", "qwen3", "t5"])
def test_a_folded_model_gives_the_logits_of_the_unfolded_one(kind):
    model = adapted(kind)
    expected = outputs(model.module)
    mw.apply(model, Fold())
    assert torch.allclose(outputs(model.module), expected, atol=1e-4 * expected.abs().max().item())


def test_convolutions_and_their_norms_fold():
    model = adapted(ResNet().eval())
    names = [type(layer.get_base_layer()).__name__ for layer in bearers(model).values()]
    assert {"Conv2d", "BatchNorm2d", "Linear"} >= set(names)
    assert names.count("BatchNorm2d") == 10
    x = torch.randn(2, 3, 16, 16)
    expected = model.module(x)
    mw.apply(model, Fold())
    assert torch.allclose(model.module(x), expected, atol=1e-5)


def test_biases_that_the_config_can_state_load_in_plain_transformers(tmp_path):
    model = mw.apply(lettered(), [Ssf(), BRIEF, Fold()], data=TEXT)
    model.save(tmp_path / "folded")
    assert model.config.attention_bias
    assert model.config.mlp_bias
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "folded").eval()
    assert plain.model.layers[0].mlp.up_proj.bias.any()
    assert torch.equal(outputs(plain), outputs(model.module))


def test_biases_that_no_config_can_state_are_written_all_the_same(tmp_path):
    model = mw.open(tiny("qwen2"))
    mw.apply(model, [Ssf(noise=0.1, where="mlp.up"), Fold()])
    model.save(tmp_path / "folded")
    loaded = mw.open(tmp_path / "folded")
    assert loaded.module.model.layers[0].mlp.up_proj.bias.any()
    assert torch.equal(outputs(loaded.module), outputs(model.module))


def test_an_adapter_folder_folds_on_opening(tmp_path):
    mw.open(tiny()).save(tmp_path / "base")
    model = mw.apply(mw.open(tmp_path / "base"), Ssf(noise=0.1))
    model.save(tmp_path / "adapter")
    folded = mw.open(f"{tmp_path / 'base'}+{tmp_path / 'adapter'}")
    assert torch.allclose(outputs(folded.module), outputs(model.module), atol=1e-5)
    assert folded.module.model.layers[0].mlp.up_proj.bias is not None


def test_users_of_peft_alone_hear_of_new_biases():
    model = adapted(where="mlp.up").module
    with pytest.warns(UserWarning, match=r"A layer without a bias gains one\. Plain transformers may leave it out"):
        model.merge_adapter()
    model.unmerge_adapter()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adapted("gpt2").module.merge_adapter()  # has them all


def test_a_packed_layer_cannot_take_the_scale():
    model = mw.apply(mw.open(tiny()), [Rtn(bits=4, group=32), Ssf()])
    with pytest.raises(ModelError, match=r"cannot go into a packed weight, which would be rounded anew\. Use quantize\.dequantize first"):
        model.module.merge_adapter()

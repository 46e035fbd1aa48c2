import copy

import peft
import pytest
import torch
from nets import ResNet
from tiny import outputs, tiny, tiny_inputs
from torch import nn

import modelwright as mw
from modelwright.core.errors import ModelError
from modelwright.core.tuners import Bearer, config_class
from modelwright.methods.adapt.diffscaler import Diffscaler
from modelwright.methods.adapt.fold import Fold
from modelwright.methods.adapt.ssf import Ssf

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft's


def moved(model, seed=0):
    """The model with all that trains a little away from where it began."""
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in model.parameters():
            if value.requires_grad:
                value.add_(0.1 * torch.randn(value.shape, generator=random))
    return model.eval()


def adapted(module, **settings):
    return moved(mw.apply(mw.open(module), Diffscaler(**settings)).module)


def parts(model):
    return {path: layer.parts["default"] for path, layer in model.get_base_model().named_modules() if isinstance(layer, Bearer)}


def test_a_case_by_hand():
    # W = [[1, 2]], b = 3, x = (1, 1): y = 6. a = 0.5, β = 1, t = 2, D = [[1, 1], [1, -3]], U = [[1, 10]]: relu(D x) = (2, 0), and
    # y' = 1.5 · 6 + 1 + 2 · 2 = 14; without the curve D x = (2, -2), and y' = 10 + 2 · (2 - 20) = -26.
    for activation, expected in (("relu", 14.0), ("none", -26.0)):
        base = nn.Linear(2, 1)
        with torch.no_grad():
            base.weight.copy_(torch.tensor([[1.0, 2.0]]))
            base.bias.fill_(3.0)
        config = config_class(Diffscaler)(target_modules=["0"], inner=2, scale=2.0, activation=activation)
        model = peft.get_peft_model(nn.Sequential(base), config)
        with torch.no_grad():
            for name, value in model.named_parameters():
                own = {"factor": [1.5], "shift": [1.0], "down": [[1.0, 1.0], [1.0, -3.0]], "up": [[1.0, 10.0]]}
                if value.requires_grad:
                    value.copy_(torch.tensor(own[name.rpartition(".")[2]]))
        assert model(torch.ones(1, 2)).item() == expected


def inputs(kind):
    return tiny_inputs(tiny(kind))


def paired(kind, **settings):
    """A model with this adapter, and one with the scales and shifts of it alone."""
    where = None if kind == "cnn" else ["attn", "mlp"]
    one = adapted(tiny(kind), activation="none", where=where, **settings)
    two = mw.apply(mw.open(tiny(kind)), Ssf(where=where)).module.eval()
    with torch.no_grad():
        for path, part in parts(two).items():
            part.factor.copy_(parts(one)[path].factor)
            part.shift.copy_(parts(one)[path].shift)
    return one, two


@pytest.mark.parametrize("kind", ["llama", "gpt2", "cnn", "vit"])
def test_without_a_bottleneck_it_is_ssf(kind):
    one, two = paired(kind, inner=0)
    assert torch.equal(outputs(one, inputs(kind)), outputs(two, inputs(kind)))


@pytest.mark.parametrize("kind", ["llama", "vit"])
def test_without_the_curve_it_is_ssf_and_lora(kind):
    one, two = paired(kind, inner=4, scale=3.0)
    config = peft.LoraConfig(r=4, lora_alpha=12, target_modules=list(parts(one)))
    lora = peft.get_peft_model(tiny(kind), config).eval().get_base_model()
    for path, part in parts(one).items():
        layer, x = lora.get_submodule(path), torch.randn(5, lora.get_submodule(path).in_features)
        with torch.no_grad():
            layer.lora_A["default"].weight.copy_(part.update.down)
            layer.lora_B["default"].weight.copy_(part.update.up)
        expected = two.get_base_model().get_submodule(path)(x) + layer(x) - layer.base_layer(x)
        assert torch.allclose(one.get_base_model().get_submodule(path)(x), expected, atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "cnn", "vit"])
def test_without_the_curve_it_folds(kind):
    model = mw.apply(mw.open(tiny(kind)), Diffscaler(inner=4, activation="none"))
    expected = outputs(moved(model.module), inputs(kind))
    mw.apply(model, Fold())
    assert torch.allclose(outputs(model.module, inputs(kind)), expected, atol=1e-4)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")
@pytest.mark.parametrize("options", [{}, {"stride": 2}, {"padding": 1}, {"padding": 2, "dilation": 2}, {"padding": "same"},
                                     {"padding": 1, "padding_mode": "circular", "stride": 2}])  # fmt: skip
@pytest.mark.parametrize("side", [1, 3, 4])
def test_maps_beside_a_convolution_stand_under_the_middle_of_its_kernel(options, side):
    torch.manual_seed(0)
    base = nn.Conv2d(3, 5, side, **options)
    model = peft.get_peft_model(nn.Sequential(base), config_class(Diffscaler)(target_modules=["0"], inner=2, activation="none"))
    moved(model)
    layer, x = model.base_model.model[0], torch.randn(2, 3, 9, 8)
    part = layer.parts["default"]
    kernel = torch.zeros(5, 3, side, side)
    kernel[:, :, side // 2, side // 2] = part.update.up @ part.update.down
    beside = copy.deepcopy(base)
    beside.weight.data, beside.bias.data = kernel, torch.zeros(5)
    expected = base(x) * part.factor.view(-1, 1, 1) + part.shift.view(-1, 1, 1) + beside(x)
    assert torch.allclose(layer(x), expected, atol=1e-5)
    layer.merge()
    assert torch.allclose(layer(x), expected, atol=1e-5)


def test_scales_and_shifts_go_into_the_weight_and_the_bottleneck_does_not():
    model = adapted(tiny(), inner=4)
    for path, layer in model.get_base_model().named_modules():
        if isinstance(layer, Bearer):
            part, base = layer.parts["default"], layer.get_base_layer()
            x = torch.randn(3, base.in_features)
            weight, bias = part.under.merged(base.weight, base.bias)
            apart = layer(x) - part.bottleneck(x)
            assert torch.allclose(nn.functional.linear(x, weight, bias), apart, atol=1e-5), path
    model = mw.apply(mw.open(tiny()), Diffscaler(inner=4))
    with pytest.raises(ModelError, match=r"bears a Parallel, which is no change of a weight\. Keep the adapter"):
        mw.apply(model, Fold())


def test_tasks_do_not_interact():
    model = mw.apply(mw.open(ResNet().eval()), Diffscaler(inner=2)).module
    x = torch.randn(2, 3, 16, 16)
    before = model(x)
    first = moved(model)(x)
    model.add_adapter("other", copy.deepcopy(model.peft_config["default"]))
    model.set_adapter("other")
    assert torch.equal(model(x), before)
    second = moved(model, seed=1)(x)
    for _ in range(2):
        model.set_adapter("default")
        assert torch.equal(model(x), first)
        model.set_adapter("other")
        assert torch.equal(model(x), second)
    assert not torch.equal(first, second)


@pytest.mark.parametrize(("scope", "scales"), [("channel", 64), ("layer", 1)])
def test_a_layer_may_have_one_scale(scope, scales):
    model = mw.apply(mw.open(tiny()), Diffscaler(scope=scope, inner=3, where="attn.q")).module
    trained = sum(value.numel() for value in model.parameters() if value.requires_grad)
    assert trained == 4 * (scales + 64 + 3 * (64 + 64))


@pytest.mark.parametrize("base", [nn.Conv2d(4, 4, 3, groups=4), nn.ConvTranspose2d(4, 4, 3)])
def test_other_convolutions_are_refused(base):
    with pytest.raises(ModelError, match=r"adapt\.diffscaler: 0 is a convolution (in 4 groups|that is transposed)\. Leave it out"):
        peft.get_peft_model(nn.Sequential(base), config_class(Diffscaler)(target_modules=["0"]))


def test_one_scale_for_all_outputs_stays_when_outputs_leave():
    part = Diffscaler(scope="layer", inner=0).part(torch.randn(6, 5), None)
    part.select(0, torch.tensor([0, 2]))
    assert (part.factor.shape, part.shift.shape) == ((1,), (2,))

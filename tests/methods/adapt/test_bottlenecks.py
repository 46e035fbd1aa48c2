"""Series and parallel adapters: the same bottleneck, in the path of a layer or beside it."""

import pytest
import torch
from calibration import TEXT, lettered
from tiny import outputs, tiny

import modelwright as mw
from modelwright.blocks._part import Layer
from modelwright.core import tuners
from modelwright.core.errors import ModelError
from modelwright.methods.adapt.fold import Fold
from modelwright.methods.adapt.lora import Lora
from modelwright.methods.adapt.parallel import Parallel
from modelwright.methods.adapt.series import Series
from modelwright.methods.train import Train

BRIEF = Train(tokens=256, batch=4, length=16, learning_rate=1e-2)


def linear(weight):
    layer = torch.nn.Linear(*reversed(weight.shape), bias=False)
    with torch.no_grad():
        layer.weight.copy_(weight)
    return layer


def filled(part, down, up):
    with torch.no_grad():
        part.bottleneck.down.copy_(torch.tensor(down))
        part.bottleneck.up.copy_(torch.tensor(up))
    return part


def parts(model):
    found = {path: layer for path, layer in model.module.get_base_model().named_modules() if isinstance(layer, tuners.Bearer)}
    return {path: layer.parts["default"] for path, layer in found.items()}


def test_a_case_by_hand_of_each_place():
    # W = 2 on (1, -3). D = (1, 1) gives -2, which relu takes to 0; D = (1, -1) gives 4, which U = (1, 0) and the scale make (8, 0).
    weight, x = 2 * torch.eye(2), torch.tensor([1.0, -3.0])
    layer = Layer.plain(linear(weight))
    for down, before, beside in (([[1.0, 1.0]], [2.0, -6.0], [2.0, -6.0]), ([[1.0, -1.0]], [18.0, -6.0], [10.0, -6.0])):
        settings = dict(inner=1, activation="relu", scale=2.0)
        parallel = filled(Parallel(**settings).part(weight, None), down, [[1.0], [0.0]])
        series = filled(Series(**settings, side="before").part(weight, None), down, [[1.0], [0.0]])
        assert parallel(x, layer).tolist() == beside  # W x + f(x)
        assert series(x, layer).tolist() == before  # W (x + f(x))
    after = filled(Series(inner=1, activation="relu", scale=2.0, side="after").part(weight, None), [[1.0, -1.0]], [[1.0], [0.0]])
    assert after(x, layer).tolist() == [18.0, -6.0]  # y + f(y): y = (2, -6), D y = 8, so 2 + 16


@pytest.mark.parametrize("activation", ["tanh", "relu", "gelu", "silu"])
def test_curves_are_torchs(activation):
    part, x = Parallel(inner=3, activation=activation).part(torch.zeros(4, 5), None), torch.randn(7, 5)
    with torch.no_grad():
        part.bottleneck.up.normal_()
        curve = torch.tanh if activation == "tanh" else getattr(torch.nn.functional, activation)
        expected = curve(x @ part.bottleneck.down.T) @ part.bottleneck.up.T
        assert torch.allclose(part(x, Layer.plain(linear(torch.zeros(4, 5)))), expected, atol=1e-6)


@pytest.mark.parametrize("method", [Series(inner=8), Parallel(inner=8)])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "vit"])
def test_attaching_changes_no_output(kind, method):
    assert torch.equal(outputs(mw.apply(mw.open(tiny(kind)), method).module), outputs(tiny(kind)))


def test_series_adapters_stand_where_the_authors_put_them():
    sides = {path.rpartition(".")[2]: part.side for path, part in parts(mw.apply(mw.open(tiny()), Series(inner=8))).items()}
    assert sides == {"gate_proj": "before", "up_proj": "before", "down_proj": "after"}


def test_as_many_numbers_train_as_the_formulas_say():
    for part in parts(mw.apply(mw.open(tiny()), Series(inner=8))).values():
        assert sum(value.numel() for value in part.parameters()) == 2 * 8 * 64  # always at the model's own width
    for path, part in parts(mw.apply(mw.open(tiny()), Parallel(inner=8, where="mlp.*"))).items():
        assert sum(value.numel() for value in part.parameters()) == 8 * (64 + 160), path


def test_a_parallel_adapter_without_a_curve_is_lora():
    model = mw.apply(mw.open(tiny()), Parallel(inner=3, activation="none", scale=2.0))
    lora = mw.apply(mw.open(tiny()), Lora(rank=3, alpha=6.0))  # alpha / rank = scale
    layers = [layer for layer in lora.module.modules() if hasattr(layer, "lora_A")]
    with torch.no_grad():
        for part, layer in zip(parts(model).values(), layers, strict=True):
            part.bottleneck.up.normal_(std=0.1)
            layer.lora_A["default"].weight.copy_(part.bottleneck.down)
            layer.lora_B["default"].weight.copy_(part.bottleneck.up)
    assert torch.allclose(outputs(model.module), outputs(lora.module), atol=1e-5)


@pytest.mark.parametrize("method", [Series(inner=4), Parallel(inner=4)])
def test_they_train_beside_a_bfloat16_model_in_float32(method):
    model = lettered()
    model.module.bfloat16()
    mw.apply(model, [method, BRIEF], data=TEXT)
    assert outputs(model.module).dtype == torch.bfloat16
    moved = [value for name, value in model.module.named_parameters() if ".up" in name and "bottleneck" in name]
    assert all(value.dtype == torch.float32 and value.any() for value in moved)


@pytest.mark.parametrize("method", [Series(inner=4), Parallel(inner=4)])
def test_they_do_not_fold(method):
    model = mw.apply(mw.open(tiny()), method)
    with pytest.raises(ModelError, match="is no change of a weight"):
        mw.apply(model, Fold())
    assert parts(model)  # they are still there

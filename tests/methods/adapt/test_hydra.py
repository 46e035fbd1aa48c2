import pytest
import torch
from tiny import outputs, tiny
from torch.nn import functional as F

import modelwright as mw
from modelwright.core import tuners
from modelwright.core.errors import SettingError
from modelwright.methods.adapt.fold import Fold
from modelwright.methods.adapt.hydra import Hydra
from modelwright.methods.adapt.lora import Lora


def bearers(model):
    return [layer for layer in model.module.modules() if isinstance(layer, tuners.Bearer)]


def moved(model, seed=0):
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in model.module.parameters():
            if value.requires_grad:
                value.add_(0.1 * torch.randn(value.shape, generator=random))
    return model


def test_a_case_by_hand():
    # f = W x + b = (3, 8). Beside it 2 · B_p A_p x with A_p x = 5 gives (10, 0), and 2 · B_s A_s f with A_s f = 8 gives (0, 16):
    # together (13, 24). Folded, W' = W + 2 (B_p A_p + B_s A_s W) and b' = b + 2 B_s A_s b.
    weight, bias, x = torch.eye(2), torch.tensor([1.0, 5.0]), torch.tensor([2.0, 3.0])
    part = Hydra(parallel=1, sequential=1, scale=2.0).part(weight, bias)
    with torch.no_grad():
        part.update.down.copy_(torch.tensor([[1.0, 1.0]]))
        part.update.up.copy_(torch.tensor([[1.0], [0.0]]))
        part.outer.down.copy_(torch.tensor([[0.0, 1.0]]))
        part.outer.up.copy_(torch.tensor([[0.0], [1.0]]))
        layer = torch.nn.Linear(2, 2)
        layer.weight.copy_(weight)
        layer.bias.copy_(bias)
        assert part(x, tuners.Layer.plain(layer)).tolist() == [13.0, 24.0]
    folded, shifted = part.merged(weight, bias)
    assert folded.tolist() == [[3.0, 2.0], [0.0, 3.0]]
    assert shifted.tolist() == [1.0, 15.0]


@pytest.mark.parametrize("kind", ["llama", "gpt2", "vit"])
def test_attaching_changes_no_output_and_folding_none_of_what_was_learned(kind):
    model = mw.apply(mw.open(tiny(kind)), Hydra())
    assert torch.equal(outputs(model.module), outputs(tiny(kind)))
    learned = outputs(moved(model).module)
    assert not torch.allclose(learned, outputs(tiny(kind)), atol=1e-3)
    mw.apply(model, Fold())
    assert type(model.module) is type(tiny(kind))
    assert (outputs(model.module) - learned).abs().max() < 1e-4


def test_without_the_sequential_update_it_is_lora():
    model = moved(mw.apply(mw.open(tiny()), Hydra(parallel=3, sequential=0, scale=2.0)))
    lora = mw.apply(mw.open(tiny()), Lora(rank=3, alpha=6.0))
    layers = [layer for layer in lora.module.modules() if hasattr(layer, "lora_A")]
    with torch.no_grad():
        for ours, theirs in zip(bearers(model), layers, strict=True):
            theirs.lora_A["default"].weight.copy_(ours.parts["default"].update.down)
            theirs.lora_B["default"].weight.copy_(ours.parts["default"].update.up)
    assert torch.allclose(outputs(model.module), outputs(lora.module), atol=1e-5)


def test_without_the_parallel_update_the_change_stays_among_the_weights_rows():
    model = moved(mw.apply(mw.open(tiny()), Hydra(parallel=0, sequential=2)))
    for layer in bearers(model):
        change, weight = layer.get_delta_weight("default").double(), layer.get_base_layer().weight.double()
        assert torch.linalg.matrix_rank(change, rtol=1e-5) == 2
        rows = torch.linalg.pinv(weight) @ weight  # the projection onto their span
        assert torch.allclose(change @ rows, change, atol=1e-6)


@pytest.mark.parametrize(("parallel", "sequential"), [(4, 4), (2, 0), (0, 3)])
def test_as_many_numbers_train_as_the_formula_says(parallel, sequential):
    for layer in bearers(mw.apply(mw.open(tiny()), Hydra(parallel=parallel, sequential=sequential))):
        rows, columns = layer.get_base_layer().weight.shape
        trained = sum(value.numel() for value in layer.parameters() if value.requires_grad)
        assert trained == parallel * (columns + rows) + 2 * sequential * rows


def test_the_sequential_update_takes_the_bias_too():
    layer = bearers(moved(mw.apply(mw.open(tiny("gpt2")), Hydra(parallel=0, where="mlp.up"))))[0]
    x, base, outer = torch.randn(3, 64), layer.get_base_layer(), layer.parts["default"].outer
    own = x @ base.weight + base.bias
    assert torch.allclose(layer(x), own + F.linear(F.linear(own, outer.down), outer.up), atol=1e-5)


def test_no_update_at_all_is_refused():
    with pytest.raises(SettingError, match="both 0, so that nothing would train"):
        Hydra(parallel=0, sequential=0)

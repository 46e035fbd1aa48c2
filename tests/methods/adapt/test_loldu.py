import pytest
import torch
from calibration import TEXT, lettered, normal, surprise
from tiny import outputs, tiny
from torch import nn

import modelwright as mw
from modelwright.blocks._part import Layer
from modelwright.core.errors import SettingError
from modelwright.methods.adapt.loldu import Loldu
from modelwright.methods.train import Train


def of(weight, **settings):
    return Loldu(**settings).part(weight, None)


def test_a_case_by_hand():
    # Rows are swapped: P L = [[0.5, 1], [1, 0]], z = (4, -1), Ũ = [[1, 1.5], [0, 1]]. With rank 1 and alpha 3 the first pivot grows from
    # 4 to 6, and W by 3 · 2 · (0.5, 1)ᵀ (1, 1.5) = [[3, 4.5], [6, 9]].
    weight = torch.tensor([[2.0, 2.0], [4.0, 6.0]])
    part = of(weight, rank=1, alpha=3.0)
    part.update.core.data.fill_(6.0)
    assert torch.allclose(part.merged(weight, None)[0], weight + torch.tensor([[3.0, 4.5], [6.0, 9.0]]))


@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (7, 7)])
@pytest.mark.parametrize("train_scale", [False, True])
def test_it_is_the_function_of_the_paper(shape, train_scale):
    # y = x (W_res + s P L_r diag(z) Ũ_r)ᵀ with W_res = W - s₀ P L_r diag(z₀) Ũ_r
    weight, x = normal(*shape), normal(4, shape[1], seed=1)
    layer, part = nn.Linear(shape[1], shape[0]), of(weight, rank=4, alpha=2.0, train_scale=train_scale)
    layer.weight.data.copy_(weight)
    order, lower, upper = torch.linalg.lu(weight)
    pivots = upper.diagonal()[:4]
    lower, upper = (order @ lower)[:, :4], upper[:4] / pivots[:, None]
    assert torch.allclose(part.update.core, pivots, atol=1e-6)
    trained, scale = normal(4, seed=2), 0.7 if train_scale else 0.5
    with torch.no_grad():
        part.update.core.copy_(trained)
        if train_scale:
            part.update.scale.fill_(scale)
    whole = weight - 0.5 * lower * pivots @ upper + scale * lower * trained @ upper
    assert torch.allclose(part(x, Layer.plain(layer)), x @ whole.T + layer.bias, atol=1e-4)
    change = part.merged(weight, None)[0] - weight
    assert torch.linalg.matrix_rank(change, atol=1e-4) <= 4


@pytest.mark.parametrize("train_scale", [False, True])
def test_attaching_changes_no_output(train_scale):
    model = mw.open(tiny())
    expected = outputs(model.module)
    mw.apply(model, Loldu(train_scale=train_scale))
    assert (outputs(model.module) - expected).abs().max() <= 1e-5


def test_it_trains_a_number_for_each_pivot_and_one_for_the_scale():
    for train_scale in (False, True):
        model = mw.apply(mw.open(tiny()), Loldu(rank=6, train_scale=train_scale, where="attn.q"))
        assert sum(value.numel() for value in model.module.parameters() if value.requires_grad) == 4 * (6 + train_scale)
    model = mw.apply(mw.open(tiny()), Loldu(where="attn.k"))
    assert sum(value.numel() for value in model.module.parameters() if value.requires_grad) == 4 * 32
    assert "cannot have the rank 768, and take 32" in model.history[-1]["notes"][0]


def test_a_weight_that_lacks_rank_still_takes_finite_steps():
    weight = torch.ones(5, 4)
    layer, part = nn.Linear(4, 5), of(weight, rank=4)
    layer.weight.data.copy_(weight)
    part(torch.randn(3, 4, generator=torch.Generator().manual_seed(0)), Layer.plain(layer)).square().sum().backward()
    assert part.update.core.grad.isfinite().all()
    assert torch.equal(part.merged(weight, None)[0], weight)


def test_the_scale_trains_where_it_is_asked_for():
    model = mw.apply(lettered(), [Loldu(rank=16, alpha=16.0, train_scale=True)])
    before = surprise(model)
    mw.apply(model, Train(tokens=2048, batch=4, length=32, learning_rate=3e-2), data=TEXT)
    assert surprise(model) < before
    moved = [value.item() for name, value in model.module.named_parameters() if name.endswith("update.scale")]
    assert len(moved) == 4 * 7
    assert all(value != 1.0 for value in moved)


@pytest.mark.parametrize(("name", "value"), [("rank", 0), ("alpha", 0.0), ("train_scale", "yes")])
def test_bad_settings_are_refused(name, value):
    with pytest.raises(SettingError, match=name):
        Loldu(**{name: value})

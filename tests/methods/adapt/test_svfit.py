import pytest
import torch
from calibration import TEXT, lettered, normal
from tiny import outputs, tiny
from torch import nn

import modelwright as mw
from modelwright.blocks._part import Layer
from modelwright.core.errors import SettingError
from modelwright.core.tuners import Bearer
from modelwright.methods.adapt.svfit import Svfit
from modelwright.methods.train import Train


def of(weight, **settings):
    """A layer of this weight [out, in] and a part on it."""
    layer = nn.Linear(weight.shape[1], weight.shape[0])
    layer.weight.data.copy_(weight)
    return layer, Svfit(**settings).part(weight, None)


def fill(part, seed=5):
    with torch.no_grad():
        for value in part.parameters():
            value.copy_(normal(*value.shape, seed=seed))
    return part


def test_a_case_by_hand():
    # W = diag(3, 2) with a row of zeros below. The first singular value, 3, grows by 4: W[0, 0] becomes 7, and relative 3 · (1 + 4) = 15.
    weight = torch.tensor([[3.0, 0.0], [0.0, 2.0], [0.0, 0.0]])
    for relative, expected in ((False, 7.0), (True, 15.0)):
        _, part = of(weight, rank=1, relative=relative)
        part.update.core.data.fill_(4.0)
        merged, bias = part.merged(weight, None)
        assert bias is None
        assert torch.allclose(merged, torch.tensor([[expected, 0.0], [0.0, 2.0], [0.0, 0.0]]), atol=1e-5)


@pytest.mark.parametrize("settings", [{}, {"rank": 3}, {"band": 1}, {"band": None}, {"relative": True}])
def test_attaching_changes_no_output(settings):
    model = mw.open(tiny())
    expected = outputs(model.module)
    mw.apply(model, Svfit(**settings))
    assert (outputs(model.module) - expected).abs().max() <= 1e-5


def test_it_is_the_function_of_the_paper():
    # y = x W_eᵀ + ((x V_r) ⊙ σ) U_rᵀ + b with W_e = W - U_r diag(σ₀) V_rᵀ
    weight, x = normal(6, 9), normal(4, 9, seed=1)
    layer, part = of(weight, rank=4)
    fill(part)
    left, first, right = torch.linalg.svd(weight, full_matrices=False)
    left, first, right = left[:, :4], first[:4], right[:4]
    rest, trained = weight - left * first @ right, first + part.update.core.detach()
    assert torch.allclose(part(x, Layer.plain(layer)), x @ rest.T + x @ right.T * trained @ left.T + layer.bias, atol=1e-5)


def test_the_change_is_diagonal_between_the_singular_vectors():
    weight = normal(8, 5)
    _, part = of(weight)
    fill(part)
    left, _, right = torch.linalg.svd(weight, full_matrices=False)
    between = left.T @ (part.merged(weight, None)[0] - weight) @ right.T
    assert torch.allclose(between, part.update.core.diag(), atol=1e-5)


def test_the_gradient_of_the_singular_values_is_the_diagonal_of_the_weights_between_the_vectors():
    weight, x = normal(8, 5), normal(7, 5, seed=1)
    layer, part = of(weight)
    part(x, Layer.plain(layer)).square().sum().backward()
    left, _, right = torch.linalg.svd(weight, full_matrices=False)
    assert torch.allclose(part.update.core.grad, (left.T @ layer.weight.grad @ right.T).diagonal(), rtol=1e-4, atol=1e-4)


def test_a_band_reaches_from_the_diagonal_to_all_of_the_core():
    weight = normal(6, 5)
    for band, kept in ((1, 5 + 2 * 4), (2, 5 + 2 * 4 + 2 * 3), (4, 25), (9, 25)):
        _, part = of(weight, band=band)
        assert sum(value.numel() for value in part.parameters()) == kept
        core = fill(part).update.core()
        far = (torch.arange(5) - torch.arange(5)[:, None]).abs() > band
        assert not core[far].any()
        assert core[~far].all()
    full, banded = of(weight, band=None)[1], of(weight, band=4)[1]
    full.update.core.data.copy_(normal(5, 5))
    banded.update.core.values.data.copy_(normal(5, 5).flatten())
    assert torch.equal(full.merged(weight, None)[0], banded.merged(weight, None)[0])
    diagonal, thin = of(weight)[1], of(weight, band=1)[1]
    diagonal.update.core.data.fill_(1.5)
    thin.update.core.values.data.copy_((torch.eye(5) * 1.5)[(torch.arange(5) - torch.arange(5)[:, None]).abs() <= 1])
    assert torch.allclose(diagonal.merged(weight, None)[0], thin.merged(weight, None)[0], atol=1e-6)


def test_relative_values_are_shares_of_the_singular_values():
    weight = normal(6, 5)
    relative, plain = of(weight, relative=True)[1], of(weight)[1]
    relative.update.core.data.fill_(0.5)
    plain.update.core.data.copy_(torch.linalg.svdvals(weight) * 0.5)
    assert torch.allclose(relative.merged(weight, None)[0], weight * 1.5, atol=1e-5)
    assert torch.allclose(plain.merged(weight, None)[0], weight * 1.5, atol=1e-5)


def test_it_trains_a_number_for_each_singular_value():
    # with all of them a sixteenth of LoRA of rank 8 on square matrices, as the paper counts: r numbers against 8 · 2 r
    model = mw.apply(mw.open(tiny()), Svfit(where="attn.q"))
    assert sum(value.numel() for value in model.module.parameters() if value.requires_grad) == 4 * 64 == 4 * 8 * 2 * 64 // 16
    model = mw.apply(mw.open(tiny()), Svfit(where="attn.{q,v}", rank={"attn.q": 7, "attn.v": 3}))
    assert sum(value.numel() for value in model.module.parameters() if value.requires_grad) == 4 * (7 + 3)


def test_a_rank_beyond_a_matrix_is_all_of_it_and_is_told():
    model = mw.apply(mw.open(tiny()), Svfit(where="attn.k", rank=100))
    assert sum(value.numel() for value in model.module.parameters() if value.requires_grad) == 4 * 32
    assert "cannot have the rank 100, and take 32" in model.history[-1]["notes"][0]


def test_the_vectors_are_saved_and_not_found_again():
    model = mw.apply(mw.open(tiny()), Svfit(rank=4))
    layer = next(layer for layer in model.module.modules() if isinstance(layer, Bearer))
    assert {"update.up", "update.down", "update.core"} == set(layer.parts["default"].state_dict())


def test_training_lowers_the_loss_and_moves_the_singular_values_alone():
    model = lettered()
    losses = []
    for _ in range(2):
        mw.apply(model, [Svfit(relative=True)] * (not losses) + [Train(tokens=2048, batch=4, length=32, learning_rate=3e-2)], data=TEXT)
        ids = torch.tensor([model.tokenizer(TEXT[0])["input_ids"][:128]])
        losses.append(float(model.module(input_ids=ids, labels=ids).loss.detach()))
    assert losses[1] < losses[0]
    assert all(torch.equal(value, tiny().get_parameter(name.replace(".base_layer", "")))
               for name, value in model.module.get_base_model().named_parameters() if "svfit_" not in name)  # fmt: skip


@pytest.mark.parametrize(("name", "value"), [("rank", 0), ("band", -1)])
def test_bad_settings_are_refused(name, value):
    with pytest.raises(SettingError, match=name):
        Svfit(**{name: value})

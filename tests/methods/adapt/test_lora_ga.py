import copy

import pytest
import torch
from calibration import TEXT, batches, lettered, normal, surprise
from peft import PeftModel
from tiny import outputs, tiny
from torch import nn

import modelwright as mw
from modelwright.core.errors import NeedError, SettingError, SiteError
from modelwright.core.gradients import mean_gradients
from modelwright.methods.adapt.lora import Lora
from modelwright.methods.adapt.lora_ga import LoraGa
from modelwright.methods.train import Train

EXACT = dict(rank=8, where="attn.k")  # 4 · 8 directions are all that a 32 × 64 matrix has, so that they are found exactly


def attached(kind="llama", **settings):
    model = mw.open(tiny(kind))
    return mw.apply(model, LoraGa(**settings), data=batches(tiny(kind)))


def bearers(model):
    return {path: layer for path, layer in model.module.get_base_model().named_modules() if hasattr(layer, "lora_A")}


def factors(layer):
    return layer.lora_B["default"].weight.detach(), layer.lora_A["default"].weight.detach(), layer.scaling["default"]


def test_a_case_by_hand():
    # G = 5 e₀ e₂ᵀ + 3 e₁ e₀ᵀ, of which with rank 1 A begins at the first row direction e₂ and B at the second column direction e₁.
    # out = 16 and γ = 4 make c = 2 / 2 = 1.
    gradient = torch.zeros(16, 3)
    gradient[0, 2], gradient[1, 0] = 5.0, 3.0
    up, down = LoraGa(rank=1, gamma=4.0).factors(gradient, gradient, 1.0)
    assert torch.allclose(up.abs()[:, 0], torch.eye(16)[1], atol=1e-5)
    assert torch.allclose(down.abs()[0], torch.eye(3)[2], atol=1e-5)
    up, down = LoraGa(rank=1, gamma=4.0, directions="A2rBr").factors(gradient, gradient, 1.0)
    assert torch.allclose(up.abs()[:, 0], torch.eye(16)[0], atol=1e-5)
    assert torch.allclose(down.abs()[0], torch.eye(3)[0], atol=1e-5)


@pytest.mark.parametrize(("directions", "of_up", "of_down"), [
    ("ArB2r", {2, 3}, {0, 1}), ("A2rBr", {0, 1}, {2, 3}), ("ArBr", {0, 2}, {1, 3}),
])  # fmt: skip
def test_each_factor_has_directions_of_its_own(directions, of_up, of_down):
    gradient = torch.diag(torch.tensor([6.0, 5.0, 4.0, 3.0, 2.0, 1.0]))
    up, down = LoraGa(rank=2, directions=directions, magnitude="unit").factors(gradient, gradient, 1.0)
    assert set(up.abs().argmax(0).tolist()) == of_up
    assert set(down.abs().argmax(1).tolist()) == of_down


def test_by_chance_the_factors_share_no_direction():
    gradient = torch.diag(torch.tensor([6.0, 5.0, 4.0, 3.0, 2.0, 1.0]))
    seen = set()
    for seed in range(8):
        torch.manual_seed(seed)
        up, down = LoraGa(rank=2, directions="random", magnitude="unit").factors(gradient, gradient, 1.0)
        own, other = set(up.abs().argmax(0).tolist()), set(down.abs().argmax(1).tolist())
        assert own | other == {0, 1, 2, 3}
        seen.add(frozenset(own))
    assert len(seen) > 1


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("settings", [{}, {"directions": "random"}, {"magnitude": "unit"}, {"magnitude": "gd"}, {"magnitude": "weights"},
                                      {"stabilised": False}])  # fmt: skip
def test_attaching_changes_no_output_and_begins_away_from_zero(kind, settings):
    model = attached(kind, rank=4, **settings)
    assert (outputs(model.module) - outputs(tiny(kind))).abs().max() < 1e-4
    for path, layer in bearers(model).items():
        up, down, scale = factors(layer)
        assert (up @ down).any()
        change = layer.get_base_layer().weight - tiny(kind).get_submodule(path).weight
        expected = -scale * up @ down
        assert torch.allclose(change, expected.T if kind == "gpt2" else expected, atol=1e-5)


@pytest.mark.parametrize(("settings", "square"), [
    ({}, 32**0.5 / 16), ({"gamma": 4.0}, 32**0.5 / 4), ({"magnitude": "unit"}, 1.0),
    ({"magnitude": "gd"}, 8 / 16.0**2), ({"magnitude": "gd", "stabilised": False}, (8 / 16) ** 2),
])  # fmt: skip
def test_the_factors_are_orthogonal_and_of_one_size(settings, square):
    for layer in bearers(attached(**EXACT, **settings)).values():
        up, down, _ = factors(layer)
        assert torch.allclose(up.T @ up, square * torch.eye(8), atol=1e-4 * square)
        assert torch.allclose(down @ down.T, square * torch.eye(8), atol=1e-4 * square)


def test_the_size_may_be_that_of_the_weights():
    for path, layer in bearers(attached(**EXACT, magnitude="weights")).items():
        up, _, scale = factors(layer)
        values = torch.linalg.svdvals(tiny().get_submodule(path).weight)[:8]
        assert torch.allclose(up.norm(dim=0), (values / scale).sqrt().mean(), rtol=1e-4)


@pytest.mark.parametrize("directions", ["ArB2r", "A2rBr", "ArBr", "random"])
def test_the_first_step_is_the_best_of_rank_2r_for_the_gradient(directions):
    # Δ(s B A) = -η s² c² [G]₂ᵣ to first order
    model = attached(**EXACT, directions=directions)
    gradients = mean_gradients(mw.open(tiny()), batches(tiny()))
    rate = 1e-4
    with torch.enable_grad():
        given = batches(tiny())
        for batch in given:
            logits = model.module(**batch).logits
            targets = batch["input_ids"][:, 1:].masked_fill(batch["attention_mask"][:, 1:] == 0, -100)
            nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), targets.flatten()).div(len(given)).backward()
    for path, layer in bearers(model).items():
        up, down, scale = (value.clone() if isinstance(value, torch.Tensor) else value for value in factors(layer))
        up_step, down_step = (-rate * one["default"].weight.grad for one in (layer.lora_B, layer.lora_A))
        moved = scale * (up_step @ down + up @ down_step)
        left, values, right = torch.linalg.svd(gradients[f"{path}.weight"])
        best = left[:, :16] * values[:16] @ right[:16]
        expected = -rate * scale**2 * (32**0.5 / 16) * best
        assert (moved - expected).norm() < 1e-3 * expected.norm()


def test_its_first_step_lowers_the_loss_more_than_that_of_a_beginning_at_zero():
    losses = []
    for method in (LoraGa(rank=4), Lora(rank=4, alpha=16.0 * 4**0.5)):  # the same s
        model = lettered()
        mw.apply(model, method, data=TEXT, length=32, samples=8)
        first = surprise(model)
        ids = torch.tensor([model.tokenizer(TEXT[0])["input_ids"][:256]])
        trained = [value for value in model.module.parameters() if value.requires_grad]
        with torch.enable_grad():
            model.module(input_ids=ids, labels=ids).loss.backward()
        with torch.no_grad():
            for value in trained:
                value.sub_(0.01 * value.grad)
        losses.append(first - surprise(model))
    assert losses[0] > losses[1] > 0


def test_the_size_does_not_depend_on_the_unit_of_the_loss():
    gradient, method = normal(16, 12), LoraGa(rank=2)
    for one, other in zip(method.factors(gradient, gradient, 1.0), method.factors(gradient * 1e-3, gradient, 1.0), strict=True):
        assert torch.allclose(one.norm(), other.norm(), rtol=1e-3)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft's, in from_pretrained
def test_the_adapter_is_saved_with_the_base_that_it_stands_on(tmp_path):
    model = lettered()
    mw.apply(model, [LoraGa(rank=4), Train(tokens=256, batch=4, length=16)], data=TEXT, length=32)
    expected = outputs(model.module)
    model.save(tmp_path / "out")
    assert (tmp_path / "out" / "base" / "model.safetensors").is_file()
    assert torch.allclose(outputs(mw.open(tmp_path / "out").module), expected, atol=1e-6)
    wrong = PeftModel.from_pretrained(tiny(), str(tmp_path / "out")).eval()
    assert not torch.allclose(outputs(wrong), expected, atol=1e-3)


def test_layers_may_have_ranks_of_their_own():
    model = attached(rank={"attn.q": 2, "mlp": 5})
    found = {path.rpartition(".")[2]: factors(layer)[0].shape[1] for path, layer in bearers(model).items()}
    assert found == {"q_proj": 2, "gate_proj": 5, "up_proj": 5, "down_proj": 5}


def test_what_it_cannot_work_on_is_refused_and_stays():
    module = tiny(tie_word_embeddings=True)
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(SiteError, match=r"stands at model\.embed_tokens\.weight and at lm_head\.weight"):
        mw.apply(module, LoraGa(where="embed"), data=batches(module))
    assert before.keys() == module.state_dict().keys()
    with pytest.raises(SiteError, match=r"rank 17 takes twice as many directions\. Give at most 16"):
        attached(rank=17, where="attn.k")
    with pytest.raises(NeedError, match="calibration text for gradients"):
        mw.apply(tiny(), LoraGa())
    for name, value in (("gamma", 0.0), ("directions", "BrAr"), ("rank", 0), ("alpha", 0.0)):
        with pytest.raises(SettingError, match=name):
            LoraGa(**{name: value})

import copy
import json

import pytest
import torch
from calibration import TEXT, lettered
from peft import PeftModel
from tiny import outputs, tiny

import modelwright as mw
from modelwright.methods.adapt.lora import Lora
from modelwright.methods.prune.magnitude import Magnitude
from modelwright.methods.train import Train

BRIEF = Train(tokens=256, batch=4, length=16, learning_rate=1e-2)


def test_a_case_by_hand():
    # Rank 1, alpha 3, so a scale of 3. With A = (1, 2, 0, ...) and B = 2 at output 5, x = (1, 1, ...) adds
    # 3 · 2 · (1 + 2) = 18 to output 5 of the matrix and nothing to the others.
    model = mw.open(tiny())
    mw.apply(model, Lora(rank=1, alpha=3, where="mlp.up"))
    layer = model.module.base_model.model.model.layers[0].mlp.up_proj
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    assert (a.shape, b.shape) == ((1, 64), (160, 1))
    with torch.no_grad():
        a.zero_()
        a[0, :2] = torch.tensor([1.0, 2.0])
        b[5] = 2
        added = layer(torch.ones(64)) - layer.base_layer(torch.ones(64))
    assert torch.allclose(added, 18.0 * (torch.arange(160) == 5), atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen2", "vit"])
def test_attaching_changes_no_output(kind):
    model = mw.open(tiny(kind))
    expected = outputs(model.module)
    mw.apply(model, Lora())
    assert torch.equal(outputs(model.module), expected)


def test_only_a_and_b_of_the_chosen_matrices_train():
    model = mw.apply(mw.open(tiny()), Lora(rank=4, where="attn.{q,v}"))
    trained = {name: value.numel() for name, value in model.module.named_parameters() if value.requires_grad}
    assert len(trained) == 4 * 2 * 2
    assert all((".q_proj.lora_" in name) or (".v_proj.lora_" in name) for name in trained)
    assert sum(trained.values()) == 4 * (4 * (64 + 64) + 4 * (64 + 32))


def test_training_moves_the_adapters_and_leaves_the_model():
    model, before = lettered(), tiny()
    mw.apply(model, [Lora(rank=4), BRIEF], data=TEXT)
    for name, value in model.module.get_base_model().named_parameters():
        if "lora_" in name:
            assert value.abs().sum() > 0, name  # B too, which began at zero
        else:
            assert torch.equal(value, before.get_parameter(name.replace(".base_layer", ""))), name


def test_the_adapters_of_a_pruned_model_train_although_they_begin_at_zero():
    model = lettered()
    mw.apply(model, [Magnitude(sparsity=0.5), Lora(rank=4), BRIEF], data=TEXT)
    moved = [value.abs().sum() > 0 for name, value in model.module.named_parameters() if "lora_B" in name]
    assert all(moved)
    assert (model.module.get_base_model().model.layers[0].mlp.up_proj.base_layer.weight == 0).sum() == 64 * 160 // 2


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft's, in from_pretrained
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_plain_peft_puts_the_saved_adapter_on_the_plain_base(kind, tmp_path):
    model = lettered(kind)
    mw.apply(model, [Lora(rank=4, alpha=12), BRIEF], data=TEXT)
    model.save(tmp_path / "adapter")
    stated = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (stated["peft_type"], stated["r"], stated["lora_alpha"]) == ("LORA", 4, 12)
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    assert not (tmp_path / "adapter" / "model.safetensors").exists()
    plain = PeftModel.from_pretrained(tiny(kind), str(tmp_path / "adapter")).eval()
    assert torch.equal(outputs(plain), outputs(model.module))
    assert not torch.allclose(outputs(plain), outputs(tiny(kind)))


def test_a_begins_uniform_and_b_at_zero():
    model = mw.apply(mw.open(tiny()), Lora(rank=32, where="mlp.up"))
    values = torch.cat([v.flatten() for name, v in model.module.named_parameters() if "lora_A" in name])
    assert values.abs().max() <= 64**-0.5  # 1/√in
    assert values.std().item() == pytest.approx((3 * 64) ** -0.5, rel=0.03)
    assert all((v == 0).all() for name, v in model.module.named_parameters() if "lora_B" in name)


def test_the_same_seed_gives_the_same_adapters():
    models = [mw.apply(mw.open(tiny()), Lora(), seed=seed) for seed in (1, 1, 2)]
    states = [copy.deepcopy(model.module.state_dict()) for model in models]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert any(not torch.equal(states[0][name], states[2][name]) for name in states[0])

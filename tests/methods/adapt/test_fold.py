import pytest
import torch
from calibration import TEXT, batches, lettered
from tiny import outputs, tiny
from transformers import AutoModelForCausalLM

import modelwright as mw
from modelwright.core.errors import PlanError
from modelwright.methods.adapt.fold import Fold
from modelwright.methods.adapt.lora import Lora
from modelwright.methods.prune.magnitude import Magnitude
from modelwright.methods.prune.wanda import Wanda
from modelwright.methods.train import Train

BRIEF = Train(tokens=256, batch=4, length=16, learning_rate=1e-2)


def test_a_case_by_hand():
    # Rank 1, alpha 3: the weight at (output 5, input 1) grows by 3/1 · B_5 · A_1 = 3 · 2 · 0.5 = 3, no other changes.
    model, before = mw.open(tiny()), tiny()
    mw.apply(model, Lora(rank=1, alpha=3, where="mlp.up"))
    with torch.no_grad():
        for name, value in model.module.named_parameters():
            if "lora_A" in name:
                value.zero_()[0, 1] = 0.5
            if "lora_B" in name:
                value[5, 0] = 2.0
    mw.apply(model, Fold())
    change = model.module.model.layers[2].mlp.up_proj.weight - before.model.layers[2].mlp.up_proj.weight
    assert change[5, 1].item() == pytest.approx(3.0, abs=1e-6)
    assert change.count_nonzero() == 1


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen2", "opt"])
def test_a_folded_model_gives_the_logits_of_the_unfolded_one(kind):
    model = lettered(kind)
    mw.apply(model, [Lora(rank=4), BRIEF], data=TEXT)
    expected = outputs(model.module)
    mw.apply(model, Fold())
    assert (outputs(model.module) - expected).abs().max() < 1e-5
    assert not torch.allclose(expected, outputs(tiny(kind)), atol=1e-3)


def test_what_is_left_is_the_plain_model(tmp_path):
    model = lettered()
    mw.apply(model, [Lora(rank=4), BRIEF, Fold()], data=TEXT)
    assert type(model.module) is type(tiny())
    assert [name for name, _ in model.module.named_parameters()] == [name for name, _ in tiny().named_parameters()]
    model.save(tmp_path / "folded")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "folded").eval()
    assert torch.equal(outputs(plain), outputs(model.module))


def test_adapters_that_were_not_trained_change_no_bit():
    model = mw.apply(mw.open(tiny()), [Lora(), Fold()])
    assert torch.equal(outputs(model.module), outputs(tiny()))


def test_a_model_without_adapters_is_refused():
    with pytest.raises(PlanError, match=r"adapt\.fold wants a model that is adapters"):
        mw.apply(tiny(), Fold())


def test_a_folded_model_counts_as_dense_again():
    model = lettered()
    mw.apply(model, [Magnitude(sparsity=0.5), Lora(rank=4), BRIEF], data=TEXT)
    assert {"sparse", "adapters"} <= model.marks
    mw.apply(model, Fold())
    assert not {"sparse", "adapters"} & model.marks
    assert (model.module.model.layers[0].mlp.up_proj.weight != 0).all()  # the update filled the zeros
    mw.apply(model, Wanda(sparsity=0.5), data=batches(model.module))
    assert (model.module.model.layers[0].mlp.up_proj.weight == 0).sum() == 64 * 160 // 2

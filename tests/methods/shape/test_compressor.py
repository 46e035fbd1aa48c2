import pytest
import torch
from calibration import TEXT, lettered
from tiny import outputs, tiny
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import modelwright as mw
from modelwright.core.contract import letters
from modelwright.core.errors import ModelError, PlanError
from modelwright.core.measure import flops_per_token
from modelwright.core.model import emptied
from modelwright.methods.distill.recover import Recover
from modelwright.methods.shape.compressor import HEADS, INNER, Compressor, Shape


def llama(shape, vocabulary, tied):
    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig(
            vocab_size=vocabulary, hidden_size=shape.width, intermediate_size=shape.inner, num_hidden_layers=shape.depth,
            num_attention_heads=shape.heads, num_key_value_heads=shape.heads, head_dim=shape.width // shape.heads, tie_word_embeddings=tied,
        ))  # fmt: skip


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("shape", [Shape(2, 16, 32, 1), Shape(4, 48, 96, 3), Shape(8, 64, 32, 5)])
def test_the_formula_is_the_count_of_the_real_model(shape, tied):
    module = llama(shape, 131, tied)
    assert shape.parameters(131, tied) == sum(value.numel() for value in module.parameters())
    assert shape.flops(131, 1) - 4 * shape.depth * shape.width == flops_per_token(module)


def test_sizes_by_hand():
    # Width 2, inner 3, two blocks, 5 tokens: 2 · 10 of embedding and head, blocks of 16 + 18 + 4, a norm of 2.
    assert Shape(1, 2, 3, 2).parameters(5, tied=False) == 20 + 2 * 38 + 2
    # Matrices of 2 · 34 + 10 entries, twice; products of attention 4 · 2 blocks · 3 tokens · 2; for each of 3 tokens.
    assert Shape(1, 2, 3, 2).flops(5, 3) == 3 * (2 * 78 + 48)


@pytest.mark.parametrize("keep", [0.1, 0.3, 0.9])
def test_the_student_is_within_one_step_of_the_wanted_size(keep):
    module = tiny()
    wanted = int(keep * sum(value.numel() for value in module.parameters()))
    shape, _ = Compressor(keep=keep).searched(module)
    step = 3 * INNER.step * shape.width * shape.depth
    assert wanted - step < shape.parameters(97, False) <= wanted
    assert shape.heads in HEADS
    assert shape.width % (2 * shape.heads) == 0


def test_no_other_shape_that_is_drawn_does_more_work():
    module, method = tiny(), Compressor(keep=0.5)
    best, _ = method.searched(module)
    wanted = int(0.5 * sum(value.numel() for value in module.parameters()))

    def fitness(shape):
        return shape.flops(97, 512) / 1e9 - 4e-6 * abs(wanted - shape.parameters(97, False))

    found = [Shape(1, width, inner, depth) for width in range(16, 129, 16) for inner in range(32, 500, 32) for depth in range(1, 13)]
    most = max(fitness(shape) for shape in found if shape.parameters(97, False) <= wanted)
    assert fitness(best) >= 0.98 * most


def test_a_fresh_student_learns_from_the_model_on_plain_text(tmp_path):
    model, teacher = lettered(), lettered()
    mw.apply(model, Compressor(keep=0.3, population=10, generations=10))
    assert type(model.module) is LlamaForCausalLM
    inputs = {"input_ids": torch.tensor([letters().encode(TEXT[0][:40])])}
    wanted = outputs(teacher.module, inputs).log_softmax(-1)

    def divergence():
        return float((wanted.exp() * (wanted - outputs(model.module, inputs).log_softmax(-1))).sum(-1).mean())

    before = divergence()
    step = Recover(tokens=4096, batch=8, length=32, learning_rate=2e-2)
    mw.apply(model, step, data=TEXT, teacher=teacher)
    assert divergence() < 0.7 * before
    model.save(tmp_path / "out")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert torch.allclose(outputs(plain), outputs(model.module), atol=1e-5)


def test_the_plan_is_what_comes_out_whatever_the_seed():
    method = Compressor(keep=0.2, population=6, generations=3)
    planned = method.planned(emptied(tiny("gpt2").bfloat16()), 0)
    assert {value.dtype for value in planned.parameters()} == {torch.bfloat16}
    one, two = (mw.apply(lettered("gpt2"), method, seed=seed).module for seed in (0, 1))
    sizes = [{name: value.shape for name, value in module.named_parameters()} for module in (planned, one, two)]
    assert sizes[0] == sizes[1] == sizes[2]
    assert not torch.equal(one.model.embed_tokens.weight, two.model.embed_tokens.weight)


def test_sizes_that_no_shape_has_and_models_without_text_are_refused():
    with pytest.raises(PlanError, match=r"keep=0\.001 asks for \d+, and shapes with this vocabulary have 5,712 to"):
        mw.apply(lettered(), Compressor(keep=0.001))
    with pytest.raises(ModelError, match="has no vocabulary"):
        mw.apply(tiny("vit"), Compressor())

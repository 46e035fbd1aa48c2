import peft
import pytest
import torch
from tiny import outputs, tiny, tiny_inputs

import modelwright as mw
from modelwright.blocks.gated import Prompt, prompted
from modelwright.core.errors import ModelError
from modelwright.core.tuners import Bearer
from modelwright.methods.adapt.prompt_lora import PromptLora

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft's
PROMPT = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])


def adapted(kind="llama", **settings):
    """A model with this adapter, whose updates are not what they begin as, nor what reads the prompt."""
    model = mw.apply(mw.open(tiny(kind)), PromptLora(**{"dropout": 0.0, **settings})).module
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for value in model.parameters():
            if value.requires_grad:
                value.add_(0.2 * torch.randn(value.shape, generator=random))
    return model.eval()


def reader(model):
    return next(module for module in model.modules() if isinstance(module, Prompt))


def test_a_case_by_hand():
    # A = (1, 0, ...), B = 2 at output 3, ρ = 2.5 there and 0 elsewhere: x = (4, 0, ...) adds 4 · 2 · 2.5 = 20 to output 3.
    model = adapted(rank=1, where="attn.q")
    layer = next(layer for layer in model.modules() if isinstance(layer, Bearer))
    (update,) = layer.parts["default"].sources
    with torch.no_grad():
        update.down.zero_()[0, 0] = 1
        update.up.fill_(2)
        reader(model).given = (2.5 * (torch.arange(64) == 3))[None]
        x = torch.zeros(1, 64)
        x[0, 0] = 4
        assert torch.allclose(layer(x) - layer.base_layer(x), 20.0 * (torch.arange(64) == 3), atol=1e-4)


def test_with_ones_it_is_lora_with_scale_one():
    model = adapted()
    paths = {path: layer.parts["default"] for path, layer in model.get_base_model().named_modules() if isinstance(layer, Bearer)}
    assert {path.rpartition(".")[2] for path in paths} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    lora = peft.get_peft_model(tiny(), peft.LoraConfig(r=8, lora_alpha=8, target_modules=list(paths))).eval()
    layers = dict(lora.get_base_model().named_modules())
    with torch.no_grad():
        for path, part in paths.items():
            layers[path].lora_A["default"].weight.copy_(part.sources[0].down)
            layers[path].lora_B["default"].weight.copy_(part.sources[0].up)
    reader(model).given = torch.ones(2, 64)
    assert torch.allclose(outputs(model), outputs(lora), atol=1e-5)


def test_without_a_prompt_a_new_adapter_counts_whole():
    model = mw.apply(mw.open(tiny()), PromptLora()).module
    found = reader(model)
    assert torch.equal(found(torch.zeros(1, 1, 64)), torch.ones(1, 64))


def test_prompts_decide_for_their_own_rows_alone():
    model, inputs = adapted(), tiny_inputs(tiny())

    def run(prompt, rows=slice(None), **named):
        with prompted(model, input_ids=prompt, **named):
            return outputs(model, {name: value[rows] for name, value in inputs.items()})

    both = run(PROMPT)
    assert torch.equal(both, run(PROMPT))
    assert not torch.allclose(both, outputs(model), atol=1e-3)
    assert not torch.allclose(both, run(PROMPT.flip(0)), atol=1e-3)
    for row in range(2):
        assert torch.allclose(run(PROMPT[row : row + 1], slice(row, row + 1)), both[row : row + 1], atol=1e-5)
    longer = torch.cat([PROMPT, torch.zeros(2, 3, dtype=torch.long)], 1)
    mask = (longer > 0).long()
    assert torch.allclose(run(longer, attention_mask=mask), both, atol=1e-5)
    assert torch.equal(outputs(model), outputs(model))
    assert reader(model).given is None


def test_the_prompt_is_read_without_the_adapter_and_once():
    model, plain = adapted(), tiny()
    states = plain.model(input_ids=PROMPT).last_hidden_state
    with prompted(model, input_ids=PROMPT):
        first = reader(model).given
        assert torch.allclose(first, reader(model)(states), atol=1e-5)
        model.generate(input_ids=PROMPT[:, :2], max_new_tokens=3, num_beams=2, do_sample=False)
        assert reader(model).given is first


def test_narrow_and_wide_layers_take_the_channels_there_are():
    for kind, width in (("llama", 32), ("gpt2", 192)):
        model = adapted(kind)
        with prompted(model, input_ids=PROMPT):
            scale = reader(model).given
            found = [layer for layer in model.modules() if isinstance(layer, Bearer) and layer.out_features == width]
            part, x = found[0].parts["default"], torch.randn(2, 5, 64)
            repeated = torch.cat([scale] * 3, 1)[:, None, :width]
            assert torch.allclose(found[0](x), found[0].base_layer(x) + part.sources[0](x) * repeated, atol=1e-5)


def test_gradients_reach_the_reader_through_the_scales():
    model = mw.apply(mw.open(tiny()), PromptLora(dropout=0.0)).module
    found = reader(model)
    with prompted(model, input_ids=PROMPT):
        model(**tiny_inputs(tiny())).logits.square().mean().backward()
    assert not any(value.grad.any() for value in found.parameters())  # B is zero, so that the scales scale nothing
    model.zero_grad()
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, Bearer):
                layer.parts["default"].sources[0].up.normal_()
    with prompted(model, input_ids=PROMPT):
        model(**tiny_inputs(tiny())).logits.square().mean().backward()
    assert all(value.grad.any() for name, value in found.named_parameters() if name != "score.bias")  # softmax knows no shift


def test_it_is_no_change_of_a_weight_and_knows_its_width():
    model = adapted()
    with pytest.raises(ValueError, match=r"Gated is no change of a weight"):
        model.merge_adapter()
    wide = prompted(adapted(where="mlp.down"), input_ids=PROMPT)
    with pytest.raises(ModelError, match=r"hidden states have 64 channels, and the adapter knows 160"), wide:
        pass

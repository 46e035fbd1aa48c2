import peft
import pytest
import torch
from tiny import outputs, tiny, tiny_inputs

import modelwright as mw
from modelwright.blocks.gated import scored
from modelwright.core.tuners import Bearer
from modelwright.methods.adapt.fold import Fold
from modelwright.methods.adapt.petalface import Petalface

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft's


def adapted(kind="vit", **settings):
    """A model with this adapter, whose two updates are not what they begin as."""
    model = mw.apply(mw.open(tiny(kind)), Petalface(**settings))
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for value in model.module.parameters():
            if value.requires_grad:
                value.add_(0.2 * torch.randn(value.shape, generator=random))
    return model


def parts(model):
    return [layer.parts["default"] for layer in model.module.modules() if isinstance(layer, Bearer)]


def at(model, quality, inputs=None):
    """The outputs where a scorer gives these qualities."""
    with scored(model.module, lambda batch: torch.as_tensor(quality)):
        return outputs(model.module, inputs)


def test_a_case_by_hand():
    # A₁ = (1, 0, ...), B₁ = 10 at output 0; A₂ = (0, 1, ...), B₂ = 100 there. x = (1, 2, 0, ...), s = 2, α = 0.25:
    # 2 · 10 · 0.75 · 1 + 2 · 100 · 0.25 · 2 = 115 more at output 0.
    model = mw.apply(mw.open(tiny()), Petalface(rank=1, scale=2.0, quality=0.25, where="attn.q"))
    layer = next(layer for layer in model.module.modules() if isinstance(layer, Bearer))
    x = torch.zeros(1, 64)
    x[0, :2] = torch.tensor([1.0, 2.0])
    with torch.no_grad():
        for place, source in enumerate(layer.parts["default"].sources):
            source.down.zero_()[0, place] = 1
            source.up.zero_()[0] = 10 ** (place + 1)
        added = layer(x) - layer.base_layer(x)
    assert torch.allclose(added, 115.0 * (torch.arange(64) == 0), atol=1e-4)


def test_the_ends_of_quality_are_one_update_alone():
    model = adapted()
    both = parts(model)
    for quality, silent in ((0.0, 1), (1.0, 0)):
        expected = at(model, [quality, quality])
        kept = [part.sources[silent].up.detach().clone() for part in both]
        for part in both:
            part.sources[silent].up.data.zero_()
        assert torch.equal(at(model, [quality, quality]), expected)
        assert not torch.allclose(at(model, [0.5, 0.5]), expected, atol=1e-3)
        for part, up in zip(both, kept, strict=True):
            part.sources[silent].up.data.copy_(up)


def test_samples_are_blended_each_by_itself():
    model = adapted()
    pixels = tiny_inputs(tiny("vit"))["pixel_values"]
    together = at(model, [0.2, 0.9])
    for place, quality in enumerate((0.2, 0.9)):
        alone = at(model, [quality], {"pixel_values": pixels[place : place + 1]})
        assert torch.allclose(together[place : place + 1], alone, atol=1e-5)
    assert not torch.allclose(together, at(model, [0.9, 0.2]), atol=1e-3)


def test_tied_updates_at_one_half_are_lora_at_half_the_scale():
    model = adapted("llama", rank=3, scale=4.0)
    names = {path: layer.parts["default"] for path, layer in model.module.get_base_model().named_modules() if isinstance(layer, Bearer)}
    lora = peft.get_peft_model(tiny(), peft.LoraConfig(r=3, lora_alpha=3 * 4.0, target_modules=list(names))).eval()
    layers = dict(lora.get_base_model().named_modules())
    with torch.no_grad():
        for path, part in names.items():
            one, two = part.sources
            two.up.copy_(one.up)
            two.down.copy_(one.down)
            layers[path].lora_A["default"].weight.copy_(one.down)
            layers[path].lora_B["default"].weight.copy_(one.up)
    assert torch.allclose(outputs(model.module), outputs(lora), atol=1e-5)  # each has α = 0.5, so that together they are one
    with torch.no_grad():
        for part in names.values():
            part.sources[0].up.zero_()
        for path in names:
            layers[path].scaling["default"] /= 2
    assert torch.allclose(outputs(model.module), outputs(lora), atol=1e-5)


def test_the_scorer_sees_the_batch_and_the_threshold_moves_the_middle():
    model, seen = adapted(threshold=0.2), []

    def scorer(batch):
        seen.append(batch)
        return batch["pixel_values"].flatten(1).mean(1).abs().clamp(0, 1)

    with scored(model.module, scorer):
        outputs(model.module)
    assert torch.equal(seen[0]["pixel_values"], tiny_inputs(tiny("vit"))["pixel_values"])
    plain = adapted(threshold=0.5)
    assert torch.allclose(at(model, [0.3, 0.1]), at(plain, [0.6, 0.4]), atol=1e-5)
    assert torch.equal(at(plain, [7.0, -7.0]), at(plain, [1.0, 0.0]))


def test_one_quality_for_all_folds_into_the_weight():
    for quality in (0.0, 0.3, 1.0):
        model = adapted(quality=quality)
        expected = at(model, [quality, quality])
        assert torch.allclose(outputs(model.module), expected, atol=1e-6)
        mw.apply(model, Fold())
        assert torch.allclose(outputs(model.module), expected, atol=1e-5)


def test_two_updates_train():
    model = adapted(rank=3, where="attn.q")
    assert sum(value.numel() for value in model.module.parameters() if value.requires_grad) == 4 * 2 * 3 * (64 + 64)
    model.module.train()
    with scored(model.module, lambda batch: torch.tensor([0.4, 0.6])):
        model.module(**tiny_inputs(tiny("vit"))).logits.square().sum().backward()
    assert all(value.grad.any() for value in model.module.parameters() if value.requires_grad)

import pytest
import torch
from calibration import batches
from tiny import tiny

from modelwright.anatomy import anatomy_of
from modelwright.core.errors import SettingError
from modelwright.core.given import Given
from modelwright.core.model import Model
from modelwright.core.walk import change, choose
from modelwright.maths.grids import affine, nearest
from modelwright.methods.quantize.gptq import Gptq
from modelwright.methods.quantize.mixed import Mixed


def bits_of(module):
    return {name: layer.bits for name, layer in module.named_modules() if hasattr(layer, "weight_packed")}


def applied(method, **sizes):
    model = Model(name="tiny", module=tiny("llama", **sizes))
    change(model, method, Given(data=batches(model.module)))
    return model


def test_one_matrix_rounded_alone_has_the_divergence_of_the_predictions():
    model = Model(name="tiny", module=tiny("llama", num_hidden_layers=1))
    data = batches(model.module)
    method = Mixed(choices=(3, 4), group=32, where="mlp.down")
    module = model.module
    with torch.no_grad():
        chosen = choose(module, anatomy_of(module).sites(module), method)
        harm = method.harm(model, chosen, data)
        weight = module.model.layers[0].mlp.down_proj.weight
        before, rows = weight.clone(), [mask.bool() for mask in (batch["attention_mask"] for batch in data)]
        right = [module(**batch).logits[mask].log_softmax(-1) for batch, mask in zip(data, rows, strict=True)]
        weight.copy_(nearest(before, affine(before, 3, 32)))
        other = [module(**batch).logits[mask].log_softmax(-1) for batch, mask in zip(data, rows, strict=True)]
        weight.copy_(before)
    apart = sum(float((p.exp() * (p - q)).sum()) for p, q in zip(right, other, strict=True)) / sum(len(p) for p in right)
    assert harm.shape == (1, 2)
    assert harm[0, 0] == pytest.approx(apart, rel=1e-3)
    assert harm[0, 0] > 2 * harm[0, 1] > 0


@pytest.mark.parametrize("bits", [2.5, 3.0, 4.7])
def test_the_bits_are_met_on_average_and_nearly_used_up(bits):
    model = applied(Mixed(bits=bits, group=32))
    found = bits_of(model.module)
    sizes = {name: model.module.get_submodule(name).weights() for name in found}
    mean = sum(found[name] * size for name, size in sizes.items()) / sum(sizes.values())
    assert bits - 0.1 < mean <= bits
    assert len(set(found.values())) > 1
    assert f"{mean:.3f} bits on average" in model.history[-1]["notes"][0]


def test_the_matrix_that_predictions_need_most_has_more_bits():
    model = Model(name="tiny", module=tiny("llama"))
    with torch.no_grad():
        for block in model.module.model.layers[:3]:
            block.mlp.down_proj.weight *= 1e-3  # what they add hardly counts
    change(model, Mixed(bits=3.0, group=32, where="mlp.down"), Given(data=batches(model.module)))
    found = [block.mlp.down_proj.bits for block in model.module.model.layers]
    assert found[3] > max(found[:3])


def test_with_one_choice_it_is_gptq_on_the_unchanged_model():
    mixed = applied(Mixed(bits=3.0, choices=(3,), group=32), num_hidden_layers=1)
    gptq = applied(Gptq(bits=3, group=32), num_hidden_layers=1)
    for name in ("self_attn.q_proj", "self_attn.k_proj", "mlp.down_proj"):
        one, other = (model.module.model.layers[0].get_submodule(name).dense() for model in (mixed, gptq))
        assert (one != other).float().mean() < 0.01, name


def test_settings_that_cannot_be_met_are_refused():
    with pytest.raises(SettingError, match=r"bits are 2.5 on average, and the least of choices is 3"):
        Mixed(bits=2.5, choices=(3, 4))
    with pytest.raises(SettingError, match=r"choices are bits from 2 to 8"):
        Mixed(choices=(1, 4))

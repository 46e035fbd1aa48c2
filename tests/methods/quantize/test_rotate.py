import pytest
import torch
from tiny import tiny, tiny_inputs

import modelwright as mw
from modelwright.anatomy._rotation import residual_norms
from modelwright.core.errors import SiteError
from modelwright.methods.quantize.rotate import Rotate
from modelwright.methods.quantize.smoothquant import SmoothQuant


def exact(model):
    """In float64, with norms that compute in it too: those of transformers go through float32."""
    model = model.double()
    for name, norm in model.named_modules():
        if name.endswith("norm"):
            offset = 1.0 if "Gemma" in type(norm).__name__ else 0.0
            eps = getattr(norm, "variance_epsilon", None) or norm.eps
            norm.forward = lambda x, norm=norm, offset=offset, eps=eps: (
                x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * (offset + norm.weight)
            )
    return model


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3", "phi3", "gemma"])
@pytest.mark.parametrize("values", [False, True])
def test_in_float64_the_outputs_stay_the_same_to_eight_digits(kind, values):
    model = exact(tiny(kind))
    before = model(**tiny_inputs(model)).logits.detach()
    mw.apply(model, Rotate(values=values))
    after = model(**tiny_inputs(model)).logits.detach()
    assert float((after - before).abs().max() / before.abs().max()) < 1e-8


def planted(scale=40.0):
    """A model with two channels of the stream far out."""
    model = tiny("llama", hidden_size=128, num_hidden_layers=2)
    with torch.no_grad():
        model.model.embed_tokens.weight[:, [7, 90]] *= scale
        for block in model.model.layers:
            for norm in (block.input_layernorm, block.post_attention_layernorm):
                norm.weight[[7, 90]] = 1.0
    return model


def states(model):
    found = []
    handles = [norm.register_forward_hook(lambda _, args, out: found.append(out.detach())) for _, norm in residual_norms(model)]
    model(**tiny_inputs(model))
    for handle in handles:
        handle.remove()
    return torch.cat([state.flatten(0, 1) for state in found])


def kurtosis(x):
    return float((x**4).mean() / (x**2).mean() ** 2)


def test_channels_far_out_are_spread_and_rounding_costs_less():
    plain, turned = planted(), planted()
    mw.apply(turned, Rotate())
    assert kurtosis(states(turned)) < 0.2 * kurtosis(states(plain))
    right = planted()(**tiny_inputs(plain)).logits.detach()
    inputs = [tiny_inputs(plain)]

    def lost(model):
        mw.apply(model, SmoothQuant(bits=4, inputs=4, migration=0.0), data=inputs)
        return float((model(**tiny_inputs(model)).logits.detach() - right).norm() / right.norm())

    assert lost(turned) < 0.85 * lost(plain)


def test_values_are_turned_head_by_head():
    plain, turned = tiny("llama"), tiny("llama")
    mw.apply(turned, Rotate())
    stream = tiny("llama")
    mw.apply(stream, Rotate(values=False))
    one, other = (model.model.layers[0].self_attn.v_proj.weight for model in (stream, turned))
    assert not torch.allclose(one, other)
    assert torch.allclose(one.view(4, 8, -1).square().sum(1), other.view(4, 8, -1).square().sum(1), rtol=1e-4)
    assert plain.model.layers[0].self_attn.q_proj.weight.shape == turned.model.layers[0].self_attn.q_proj.weight.shape


def test_models_whose_norms_subtract_a_mean_are_refused():
    with pytest.raises(SiteError, match="LayerNorm"):
        mw.apply(tiny("gpt2"), Rotate())

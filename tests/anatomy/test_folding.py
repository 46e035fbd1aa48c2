import pytest
import torch
from tiny import CAUSAL, outputs, tiny, tiny_inputs

import modelwright as mw
from modelwright.anatomy._folding import apply_fold, apply_shift, folds, movable_mean
from modelwright.core.errors import SiteError
from modelwright.methods.encode.bitstack import Bitstack
from modelwright.methods.factor.svd import Svd
from modelwright.methods.quantize.awq import Awq
from modelwright.methods.quantize.mergequant import MergeQuant
from modelwright.methods.quantize.smoothquant import SmoothQuant

EXPECTED = {"llama": ["norm", "up"], "qwen3": ["norm", "up"], "gemma2": ["norm", "up"], "phi3": ["norm", "up"], "phi": ["norm"],
            "olmo2": ["up"], "gpt2": ["norm", "value"], "gpt_neox": ["norm", "value"], "opt": ["norm", "value"], "bert": ["value"],
            "vit": ["norm", "value"], "qwen3_moe": ["norm"]}  # fmt: skip


@pytest.mark.parametrize("kind", [*CAUSAL, "bert", "vit"])
def test_a_factor_moves_between_matrices_and_no_output_changes(kind):
    model = tiny(kind)
    before, found = outputs(model), folds(model)
    if kind in EXPECTED:
        assert sorted({fold.kind for fold in found}) == EXPECTED[kind]
    generator = torch.Generator().manual_seed(5)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    for fold in found:
        apply_fold(model, fold, 0.3 + 2 * torch.rand(fold.makers[0][2].numel(), generator=generator))
        changed = {name for name, value in model.state_dict().items() if not torch.equal(value, weights[name])}
        assert {site.name for site in fold.readers} | {name for name, _, _ in fold.makers} <= changed
    assert torch.allclose(outputs(model), before, atol=3e-5 * before.abs().max())


@pytest.mark.parametrize("kind", ["llama", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("gpt2", "opt", "phi3"))])
def test_of_two_factors_the_first_reads_what_a_norm_makes(kind):
    model = mw.apply(mw.open(tiny(kind)), Svd(keep=0.6)).module
    before, found = outputs(model), folds(model)
    assert {fold.kind for fold in found} >= {"norm"}
    for fold in found:
        factor = 0.3 + 2 * torch.rand(fold.makers[0][2].numel(), generator=torch.Generator().manual_seed(5))
        if all(name in dict(model.named_parameters()) for name, _, _ in fold.makers):
            apply_fold(model, fold, factor)
    assert torch.allclose(outputs(model), before, atol=3e-5 * before.abs().max())
    for method in (Awq(bits=8, group=0, points=3), SmoothQuant(), MergeQuant(bits=8, inputs=8), Bitstack(terms=8, rank=8, measure="error")):
        start = mw.apply(mw.open(tiny(kind)), Svd(keep=0.6))
        after = outputs(mw.apply(start, method, data=[tiny_inputs(start.module)]).module)
        assert (after - before).norm() < 0.3 * before.norm(), method


@pytest.mark.parametrize("kind", [*CAUSAL, "bert", "vit"])
def test_what_is_taken_from_inputs_goes_into_biases_and_no_output_changes(kind):
    model = tiny(kind)
    before, names = outputs(model), dict(model.named_parameters())
    found = [fold for fold in folds(model) if movable_mean(fold, names)]
    assert bool(found) == (kind in ("gpt2", "gpt_neox", "opt", "phi", "vit"))
    generator = torch.Generator().manual_seed(5)
    for fold in found:
        held = {name: names[name].clone() for name in (*(f"{site.module}.bias" for site in fold.readers), fold.makers[-1][0])}
        apply_shift(model, fold, torch.randn(fold.makers[0][2].numel(), generator=generator))
        assert not any(torch.equal(names[name], value) for name, value in held.items())
    assert torch.allclose(outputs(model), before, atol=3e-5 * before.abs().max())


def test_heads_that_share_values_are_left_as_they_are():
    assert "value" not in {fold.kind for fold in folds(tiny("llama"))}
    assert "value" in {fold.kind for fold in folds(tiny("llama", num_key_value_heads=8))}


def test_what_shows_the_harm_is_the_smallest_part_that_holds_all_readers():
    scopes = {fold.kind + str(len(fold.readers)): fold.scope for fold in folds(tiny("llama")) if fold.depth == 1}
    assert scopes == {"norm3": "model.layers.1.self_attn", "norm2": "model.layers.1.mlp", "up1": "model.layers.1.mlp.down_proj"}
    parallel = [fold for fold in folds(tiny("phi")) if fold.depth == 1]
    assert [fold.scope for fold in parallel] == ["model.layers.1"]


def test_a_factor_that_overflows_is_refused_by_name_and_nothing_changes():
    model = tiny("llama").to(torch.float16)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    fold = next(fold for fold in folds(model) if fold.kind == "norm")
    with pytest.raises(SiteError, match=r"input_layernorm.weight would overflow.*wider dtype"):
        apply_fold(model, fold, torch.full((64,), 1e-6))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())

import copy

import pytest
import torch
from calibration import batches, blocks_of, gathered
from tiny import tiny

import modelwright as mw
from modelwright.core.contract import same, state
from modelwright.core.errors import SettingError, SiteError
from modelwright.core.given import Given
from modelwright.core.model import Model, emptied
from modelwright.core.plan import predict
from modelwright.maths import allocation
from modelwright.methods.prune.magnitude import Magnitude
from modelwright.methods.prune.ria import Ria
from modelwright.methods.prune.sparsegpt import SparseGpt
from modelwright.methods.prune.wanda import Wanda


def uneven():
    """A model whose second block has a few large inputs, and so outliers."""
    module = tiny("llama")
    module.model.layers[1].input_layernorm.weight.data[:3] *= 60
    module.model.layers[1].post_attention_layernorm.weight.data[:3] *= 60
    return module


def test_owl_takes_the_outliers_of_the_unchanged_model():
    module = uneven()
    data = batches(module)
    inputs = {}
    for name, _ in blocks_of(mw.open(module)):
        layer = module.get_submodule(name.removesuffix(".weight"))
        layer.register_forward_pre_hook(lambda _, args, name=name: inputs.setdefault(name, []).append(args[0].detach()))
    for batch in data:
        module(**batch)
    found = []
    for depth in range(4):
        scores = []
        for name, weight in blocks_of(mw.open(module)):
            if f"layers.{depth}." in name:
                real = torch.cat([x[batch["attention_mask"].bool()] for x, batch in zip(inputs[name], data, strict=True)])
                scores.append(weight.abs() * gathered(real, "norm").norm)
        found.append(allocation.outliers(scores, 5.0))
    expected = [1 - keep for keep in allocation.owl(found, [1] * 4, 0.5, 0.08)]
    for method in (Wanda, SparseGpt):
        after = mw.apply(uneven(), method(allocate="owl"), data=data)
        for name, weight in blocks_of(mw.open(after)):
            assert int((weight == 0).sum()) == method(sparsity=round(expected[int(name.split(".")[2])], 12)).zeros(*weight.shape), name
    assert min(expected) == expected[1]
    assert max(expected) - min(expected) == pytest.approx(0.16)


def test_an_outlier_is_as_many_times_the_mean_as_the_setting_says():
    weight, statistics = uneven().model.layers[1].mlp.gate_proj.weight.detach(), gathered(torch.randn(50, 64) * torch.logspace(-1, 1, 64))
    found = [Wanda(allocate="owl", outlier=times).survey([(weight, statistics)]) for times in (2.0, 5.0)]
    assert found == [allocation.outliers([weight.abs() * statistics.norm], times) for times in (2.0, 5.0)]
    assert found[0] > found[1] > 0


def test_owl_without_spread_is_uniform_bit_by_bit():
    data = batches(tiny("llama"))
    one = mw.apply(uneven(), Wanda(allocate="owl", spread=0.0, sparsity=0.3), data=data)
    other = mw.apply(uneven(), Wanda(sparsity=0.3), data=data)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("method", [Wanda, SparseGpt, Ria])
def test_owl_gives_every_block_a_pattern_of_its_own_whose_mean_is_the_one_that_was_asked_for(method):
    data = batches(uneven())
    module = mw.apply(uneven(), method(allocate="owl", pattern="4:8", spread=0.125), data=data)
    counts = []
    for depth in range(4):
        weights = [weight for name, weight in blocks_of(mw.open(module)) if f"layers.{depth}." in name]
        kept = {int(count) for weight in weights for count in (weight != 0).unflatten(1, (-1, 8)).sum(-1).unique()}
        assert len(kept) == 1
        counts += kept
    assert sum(counts) == 4 * 4
    assert max(counts) - min(counts) == 2
    assert max(counts) == counts[1]


def test_a_pattern_of_each_block_goes_with_inputs_that_trade_places():
    module = uneven()
    mw.apply(module, Ria(allocate="owl", pattern="4:8", spread=0.125, permute=True, store="sparse"), data=batches(uneven()))
    zeros = [(block.mlp.down_proj.dense() == 0).unflatten(1, (-1, 8)).sum(-1) for block in module.model.layers]
    assert all((own == own[0, 0]).all() for own in zeros)
    assert len({int(own[0, 0]) for own in zeros}) == 3


@pytest.mark.parametrize("allocate", ["owl", "erk"])
@pytest.mark.parametrize("kind", ["llama", "qwen3_moe"])
def test_a_streamed_model_is_divided_as_one_in_memory(allocate, kind, tmp_path):
    module = uneven() if kind == "llama" else tiny(kind)
    Model(name="m", module=copy.deepcopy(module)).save(tmp_path / "in")
    data = batches(module)
    streamed = mw.apply(tmp_path / "in", Wanda(allocate=allocate), data=data, save=tmp_path / "out")
    here = mw.apply(module, Wanda(allocate=allocate), data=data)
    assert same(state(mw.open(here)), state(streamed))
    if allocate == "owl":
        assert "found in the unchanged blocks, first to last: " in streamed.history[-1]["notes"][0]


def test_erk_takes_every_expert_as_a_matrix():
    module = mw.apply(tiny("qwen3_moe"), Wanda(allocate="erk"), data=batches(tiny("qwen3_moe")))
    experts = module.model.layers[0].mlp.experts
    assert experts.gate_up_proj.shape == (8, 96, 64)  # gate and up are matrices of 48 rows each
    shapes = [(128, 64), (64, 64), (64, 64), (64, 128)] + [(48, 64), (48, 64), (64, 48)] * 8
    kept = allocation.erk(shapes, 0.5)
    assert ((experts.down_proj == 0).sum(-1) == int((1 - kept[-1]) * 48)).all()
    assert ((experts.gate_up_proj == 0).sum(-1) == int((1 - kept[-2]) * 64)).all()


@pytest.mark.parametrize("method", [Magnitude, Wanda, SparseGpt])
def test_erk_divides_by_the_sizes_of_matrices_and_the_whole_is_as_asked(method):
    module = tiny("llama")
    weights = [weight.clone() for _, weight in blocks_of(mw.open(module))]
    expected = [1 - keep for keep in allocation.erk([tuple(weight.shape) for weight in weights], 0.5)]
    mw.apply(module, method(allocate="erk"), data=batches(module))
    after = [weight for _, weight in blocks_of(mw.open(module))]
    assert [float((weight == 0).float().mean()) for weight in after] == pytest.approx(expected, abs=1 / 64)
    if method is Magnitude:
        assert sum(int((weight == 0).sum()) for weight in after) == pytest.approx(0.5 * sum(map(torch.numel, weights)), abs=len(weights))


def test_erk_streams_tensor_by_tensor_with_the_same_result(tmp_path):
    for kind in ("llama", "qwen3_moe"):
        Model(name="m", module=tiny(kind)).save(tmp_path / kind)
        streamed = mw.apply(tmp_path / kind, Magnitude(allocate="erk"), save=tmp_path / f"{kind}-out")
        here = mw.apply(tiny(kind), Magnitude(allocate="erk"))
        assert same(state(mw.open(here)), state(streamed))


def test_the_plan_knows_what_erk_leaves():
    module = tiny("llama")
    _, zeros = predict(emptied(module), Magnitude(allocate="erk", sparsity=0.4), Given())
    matrices = sum(weight.numel() for _, weight in blocks_of(mw.open(module)))
    assert zeros == pytest.approx(0.4 * matrices, rel=1e-9)


def test_what_cannot_be_divided_is_refused():
    with pytest.raises(SettingError, match="erk divides one sparsity, and the pattern 2:4 leaves none"):
        Wanda(allocate="erk", pattern="2:4")
    with pytest.raises(SettingError, match="several were given. Give one number, or use allocate: uniform"):
        SparseGpt(allocate="erk", sparsity={"mlp": 0.5})
    with pytest.raises(SettingError, match="allocate must be one of 'uniform', 'erk', 'even'; got 'owl'"):
        Magnitude(allocate="owl")
    with pytest.raises(SiteError, match="no single row of them. Divide its work otherwise, such as with allocate: erk"):
        mw.apply(tiny("t5"), Wanda(allocate="owl"), data=batches(tiny("t5")))
    mw.apply(tiny("t5"), Wanda(allocate="erk"), data=batches(tiny("t5")))

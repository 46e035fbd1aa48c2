import pytest
import torch
from calibration import blocks_of, normal
from hypothesis import given, settings
from hypothesis import strategies as some
from tiny import tiny

import modelwright as mw
from modelwright.anatomy import anatomy_of
from modelwright.blocks.experts import split_experts
from modelwright.blocks.sparse import SparseLinear
from modelwright.core.errors import SettingError, SiteError
from modelwright.methods.prune.magnitude import Magnitude


def test_a_case_by_hand():
    # Sizes 1 2 3 4 0.5 6; half of six go: 0.5, 1 and 2. The first row loses two and the second one: no ranking by row.
    weight = torch.tensor([[1.0, -2.0, 3.0], [-4.0, 0.5, 6.0]])
    assert Magnitude(sparsity=0.5).tensor(weight).tolist() == [[0.0, 0.0, 3.0], [-4.0, 0.0, 6.0]]


def test_a_pattern_says_how_many_stay():
    # "1:4" keeps one of four: 4 of (1 -4 2 3), and 8 of (8 5 -6 7). "3:4" would keep three.
    weight = torch.tensor([[1.0, -4.0, 2.0, 3.0, 8.0, 5.0, -6.0, 7.0]])
    assert Magnitude(pattern="1:4").tensor(weight).tolist() == [[0, -4, 0, 0, 8, 0, 0, 0]]
    assert Magnitude(pattern="3:4").tensor(weight).tolist() == [[0, -4, 2, 3, 8, 0, -6, 7]]


def test_of_equal_weights_exactly_the_asked_number_goes():
    result = Magnitude(sparsity=0.5).tensor(torch.ones(3, 7))
    assert (result == 0).sum() == 10


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    rows=some.integers(1, 9),
    columns=some.integers(1, 40),
    sparsity=some.floats(0, 1),
    levels=some.integers(1, 50),
    seed=some.integers(0, 99),
)
def test_exactly_the_smallest_go_and_the_others_stay(rows, columns, sparsity, levels, seed):
    weight = (normal(rows, columns, seed=seed) * levels).round() + 0.5  # few levels: many ties, no zero
    result = Magnitude(sparsity=sparsity).tensor(weight)
    gone = result == 0
    assert gone.sum() == int(sparsity * weight.numel())
    assert torch.equal(result[~gone], weight[~gone])
    if gone.any() and not gone.all():
        assert weight[gone].abs().max() <= weight[~gone].abs().min()


def test_every_matrix_of_the_blocks_loses_its_share_and_nothing_else_changes():
    before, model = tiny(), mw.open(tiny())
    mw.apply(model, Magnitude(sparsity=0.3))
    pruned = dict(blocks_of(model))
    assert len(pruned) == 4 * 7
    for name, weight in pruned.items():
        assert (weight == 0).sum() == int(0.3 * weight.numel()), name
    for name, weight in model.module.named_parameters():
        if name not in pruned:  # embedding, head and norms
            assert torch.equal(weight, before.get_parameter(name)), name


def test_runs_lie_along_the_inputs_whichever_way_a_matrix_is_stored():
    model = mw.apply(tiny("gpt2"), Magnitude(pattern="2:4"))
    stored = model.transformer.h[1].mlp.c_fc.weight  # [in, out]
    assert ((stored.T.reshape(160, 16, 4) == 0).sum(-1) == 2).all()


def test_every_expert_is_ranked_by_itself():
    model = tiny("mixtral")
    model.model.layers[0].mlp.experts.down_proj.data[3] *= 100
    mw.apply(model, Magnitude(sparsity=0.5))
    stack = model.model.layers[0].mlp.experts.down_proj
    assert ((stack == 0).sum((1, 2)) == stack[0].numel() // 2).all()


def test_a_convolution_is_pruned_as_a_matrix_of_its_filters():
    model = tiny("cnn")
    weight = model.second.weight.detach().clone()
    mw.apply(model, Magnitude(sparsity=0.5))
    expected = Magnitude(sparsity=0.5).tensor(weight.flatten(1)).view_as(weight)
    assert torch.equal(model.second.weight, expected)


def test_what_a_convolution_cannot_take_is_said():
    with pytest.raises(SiteError, match=r"first.weight has 27 inputs, which the pattern 2:4 does not divide"):
        mw.apply(tiny("cnn"), Magnitude(pattern="2:4"))
    with pytest.raises(SiteError, match="store: dense"):
        mw.apply(tiny("cnn"), Magnitude(store="sparse"))


@pytest.mark.parametrize("settings_", [{"sparsity": 0.3}, {"pattern": "1:4"}, {"sparsity": 0.0}, {"sparsity": 1.0}])
def test_the_sparse_form_holds_the_same_weights_and_takes_the_bytes_that_were_planned(settings_):
    weight = normal(24, 36)
    layer = Magnitude(**settings_, store="sparse").tensor(weight)
    assert isinstance(layer, SparseLinear)
    assert torch.equal(layer.dense(), Magnitude(**settings_).tensor(weight))
    assert layer.stored_bytes() == Magnitude(**settings_, store="sparse").planned(weight.to("meta")).stored_bytes()


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen3_moe"])
@pytest.mark.parametrize("store", ["dense", "sparse"])
def test_all_weights_may_compete(kind, store, tmp_path):
    module = tiny(kind)
    mw.open(module).save(tmp_path / "in")
    before = chosen(mw.open(tmp_path / "in").module)
    every = torch.cat([weight.flatten() for weight in before.values()]).abs()
    threshold = every.sort().values[int(0.6 * len(every)) - 1]
    method = Magnitude(sparsity=0.6, scope="model", store=store)
    streamed = mw.apply(tmp_path / "in", method, save=tmp_path / "out")
    held = mw.apply(mw.open(tmp_path / "in"), method)
    for model in (streamed, held):
        split_experts(model.module)
        for name in before:
            weight = model.module.get_submodule(name).weight
            weight = weight.T if (kind, store) == ("gpt2", "sparse") else weight  # stored [out, in], where GPT-2 has [in, out]
            assert torch.equal(weight, before[name].masked_fill(before[name].abs() <= threshold, 0)), name
    shares = [float((held.module.get_submodule(name).weight == 0).float().mean()) for name in before]
    assert max(shares) - min(shares) > 0.01  # matrices with small weights lose more


def chosen(module):
    """The matrices of a model's blocks, dense, experts one by one."""
    split_experts(module)
    sites = [site for site in anatomy_of(module).sites(module) if site.role.startswith(("attn", "mlp", "experts"))]
    return {site.module: module.get_submodule(site.module).weight.detach().clone() for site in sites}


def test_one_threshold_takes_one_sparsity():
    for wrong in ({"sparsity": {"mlp": 0.5}}, {"pattern": "2:4"}, {"allocate": "erk"}):
        with pytest.raises(SettingError, match="scope: model has one threshold for all weights"):
            Magnitude(scope="model", **wrong)

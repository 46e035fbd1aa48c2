import copy
from dataclasses import replace

import pytest
import torch
from calibration import batches, correlated, gathered, normal
from tiny import outputs, tiny

import modelwright as mw
from modelwright.core.contract import same, state
from modelwright.core.errors import SettingError
from modelwright.core.model import Model
from modelwright.methods.prune.magnitude import Magnitude
from modelwright.methods.prune.ria import Ria
from modelwright.methods.prune.wanda import Wanda


def test_a_case_by_hand():
    # Columns sum to 3, 5 and rows to 3, 5. Inputs of mean square 16 and 1: norms 4 and 1, to the power of a half 2 and 1.
    statistics = gathered(torch.tensor([[4.0, 1.0], [-4.0, -1.0]]))
    weight = torch.tensor([[1.0, -2.0], [2.0, 3.0]])
    expected = torch.tensor([[2 * (1 / 3 + 1 / 3), 2 / 5 + 2 / 3], [2 * (2 / 3 + 2 / 5), 3 / 5 + 3 / 5]])
    assert torch.allclose(Ria().score(weight, statistics), expected)
    # 1.33, 1.07; 2.13, 1.2: of all the -2 goes first; by rows the -2 and the 3.
    assert Ria(sparsity=0.25).layer(weight, statistics).tolist() == [[1.0, 0.0], [2.0, 3.0]]
    assert Ria(sparsity=0.5, scope="row").layer(weight, statistics).tolist() == [[1.0, 0.0], [2.0, 0.0]]


def test_without_activations_and_with_equal_sums_it_is_magnitude():
    circulant = torch.stack([normal(16).roll(shift) for shift in range(16)])  # all rows and columns have one sum
    statistics = gathered(correlated(50, 16))
    result = Ria(power=0.0, sparsity=0.37).layer(circulant, statistics)
    least = circulant[result != 0].abs().min()
    assert int((result == 0).sum()) == int(0.37 * 256)
    assert circulant[result == 0].abs().max() <= least * (1 + 1e-6)
    exact = Ria(power=0.0, pattern="2:4").layer(circulant, statistics)
    assert torch.equal(exact, Magnitude(pattern="2:4").tensor(circulant))


def test_weights_of_dead_rows_and_columns_score_0():
    weight = normal(6, 8)
    weight[2], weight[:, 5] = 0, 0
    score = Ria().score(weight, gathered(correlated(30, 8)))
    assert score.isfinite().all()
    assert (score[2] == 0).all()
    assert (score[:, 5] == 0).all()


def test_a_permuted_model_is_the_dense_one_before_it_is_pruned():
    module = tiny("llama")
    before = outputs(module)
    mw.apply(module, Ria(pattern="4:4", permute=True), data=batches(module))  # keeps all
    assert torch.allclose(outputs(module), before, atol=1e-5)


def test_permuted_weights_keep_more_of_the_score_and_the_pattern_holds():
    data = batches(tiny("llama"))
    plain, permuted = tiny("llama"), tiny("llama")
    for module in (plain, permuted):
        module.model.layers[0].mlp.down_proj.weight.data[:, :40] *= 5  # strong neurons that stand together
    mw.apply(plain, Ria(pattern="2:4"), data=data)
    mw.apply(permuted, Ria(pattern="2:4", permute=True, assign=False), data=data)
    for block in permuted.model.layers:
        for layer in (block.mlp.down_proj, block.self_attn.o_proj, block.mlp.up_proj, block.self_attn.q_proj):
            assert ((layer.weight == 0).view(layer.out_features, -1, 4).sum(-1) == 2).all()
    one, other = (module.model.layers[0].mlp.down_proj.weight for module in (plain, permuted))
    assert (other != 0).sum() == (one != 0).sum()
    assert other.abs().sum() > 1.05 * one.abs().sum()
    assert not torch.equal(permuted.model.layers[0].mlp.up_proj.weight, plain.model.layers[0].mlp.up_proj.weight)
    row = permuted.model.layers[0].mlp.up_proj.weight[0]
    assert any(torch.equal(row, other) for other in plain.model.layers[0].mlp.up_proj.weight)


def test_an_assignment_keeps_more_of_the_score_than_dealing_alone():
    method, module = Ria(pattern="1:4"), tiny("llama")
    statistics = gathered(correlated(60, 160))
    weight = module.model.layers[0].mlp.down_proj.weight.detach()
    score, inputs = method.score(weight, statistics), torch.arange(160).view(1, 1, 160)
    found = [replace(method, permute=True, assign=assign).arrange(weight, statistics, inputs)[0] for assign in (False, True)]
    dealt, assigned = (float(score[:, order].unflatten(1, (-1, 4)).amax(-1).sum()) for order in found)
    assert assigned > 1.01 * dealt


@pytest.mark.parametrize("settings", [{"stages": True}, {"store": "sparse"}, {"stages": True, "store": "sparse"}])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_streamed_model_is_permuted_as_one_in_memory(kind, settings, tmp_path):
    method = Ria(pattern="2:4", permute=True, **settings)
    module = tiny(kind)
    Model(name="m", module=copy.deepcopy(module)).save(tmp_path / "in")
    streamed = mw.apply(tmp_path / "in", method, data=batches(module), save=tmp_path / "out")
    here = mw.apply(mw.open(copy.deepcopy(module)), method, data=batches(module))
    assert same(state(here), state(streamed))


def test_it_differs_from_wanda():
    weight, statistics = normal(12, 32) * torch.logspace(-1, 1, 12)[:, None], gathered(correlated(100, 32))
    assert not torch.equal(Ria(scope="row").layer(weight, statistics), Wanda().layer(weight, statistics))


def test_permuting_without_a_pattern_is_refused():
    with pytest.raises(SettingError, match="permute mixes the inputs of a pattern's runs, and there is no pattern"):
        Ria(permute=True)


def test_inputs_that_cannot_move_are_said():
    model = mw.apply(mw.open(tiny("llama")), Ria(pattern="2:4", permute=True, stages=True, store="sparse"), data=batches(tiny("llama")))
    left = [note for note in model.history[-1]["notes"] if "left the inputs of" in note]
    assert len(left) == 8
    assert left[0] == (
        "prune.ria left the inputs of model.layers.0.self_attn.o_proj where they are: what makes them is stored otherwise by now"
    )
    model = mw.apply(mw.open(tiny("llama")), Ria(pattern="8:16", permute=True), data=batches(tiny("llama")))
    assert "runs of 8 inputs do not suit it" in model.history[-1]["notes"][0]


def test_rows_compete_alone_or_all_weights_of_a_matrix():
    # Sums of columns 21, 32 and of rows 3, 50: scores 2 (1/21 + 1/3), 2/32 + 2/3; 2 (20/21 + 20/50), 30/32 + 30/50.
    statistics = gathered(torch.tensor([[4.0, 1.0], [-4.0, -1.0]]))
    weight = torch.tensor([[1.0, -2.0], [20.0, 30.0]])
    assert Ria(sparsity=0.5).layer(weight, statistics).tolist() == [[0.0, 0.0], [20.0, 30.0]]
    assert Ria(sparsity=0.5, scope="row").layer(weight, statistics).tolist() == [[1.0, 0.0], [20.0, 0.0]]

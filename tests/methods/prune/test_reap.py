import copy

import pytest
import torch
from calibration import batches
from tiny import outputs, tiny
from torch.nn import functional

import modelwright as mw
from modelwright.anatomy import anatomy_of
from modelwright.core.errors import SettingError, SiteError
from modelwright.core.model import Model
from modelwright.methods.prune.reap import Reap, merge_into

KINDS = ["mixtral", "qwen3_moe", "qwen2_moe", "olmoe"]


def looked(module, data, **settings):
    method = Reap(**settings)
    found = method.found(module)
    return method, found, method.look(Model(name="", module=module), found, data)


def out_of_reach(patch, reach):
    """Let routers, by the identity of their weights, choose among some experts alone: the others' logits are -inf."""
    linear = functional.linear

    def masked(x, weight, bias=None):
        out = linear(x, weight, bias)
        if id(weight) in reach:
            gone = torch.ones(out.shape[-1]).bool()
            gone[reach[id(weight)]] = False
            out = out.masked_fill(gone, float("-inf"))
        return out

    patch.setattr(functional, "linear", masked)


def test_a_case_by_hand():
    # Expert 0: tokens with gates .5 and .25 and outputs of length 2 and 4; expert 1: one of .75 and 1; expert 2: none.
    sums = torch.tensor([[2.0, 1.0, 0.0], [0.75, 0.75, 0.0], [6.0, 1.0, 0.0], [2.0, 0.75, 0.0]])
    expected = {"frequency": [2, 1, 0], "gate": [0.75, 0.75, 0], "norm": [3, 1, 0], "reap": [1, 0.75, 0]}
    for measure, scores in expected.items():
        assert Reap(measure=measure).score(*sums).tolist() == scores


@pytest.mark.parametrize("name", KINDS)
@torch.no_grad()
def test_the_sums_are_those_of_the_router_and_the_experts(name):
    module = tiny(name)
    data = batches(module)
    seen = []
    block = [block.mlp for block in module.model.layers if hasattr(block.mlp, "experts")][1]
    block.experts.register_forward_pre_hook(lambda _, args: seen.append(args[:3]))
    _, found, sums = looked(module, data)
    seen.clear()
    for batch in data:
        module(**batch)
    total = torch.zeros(4, 8, dtype=torch.float64)
    for batch, (hidden, index, weights) in zip(data, seen, strict=True):
        real = batch["attention_mask"].bool().view(-1) if "attention_mask" in batch else torch.ones(len(hidden)).bool()
        for token in real.nonzero()[:, 0].tolist():
            for place, expert in enumerate(index[token].tolist()):
                gate, up = (hidden[token] @ block.experts.gate_up_proj[expert].T).chunk(2)
                out = (block.experts.act_fn(gate) * up) @ block.experts.down_proj[expert].T
                norm, weight = float(out.norm()), float(weights[token, place])
                total[:, expert] += torch.tensor([1.0, weight, norm, weight * norm])
    assert torch.allclose(sums[found[1].scope], total, rtol=1e-4)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("measure", ["reap", "norm", "gate", "frequency"])
def test_experts_that_no_token_reaches_leave_without_a_trace(name, measure, tmp_path, monkeypatch):
    module = tiny(name)
    gates = [block.mlp.gate for block in module.model.layers if hasattr(block.mlp, "experts")]
    out_of_reach(monkeypatch, {id(gate.weight): [0, 1, 3, 4, 6, 7] for gate in gates})
    data, before = batches(module), outputs(module)
    model = mw.apply(Model(name=name, module=module), Reap(share=0.25, measure=measure), data=data)
    assert {units.count for units in anatomy_of(module).units(module, "experts")} == {6}
    monkeypatch.undo()
    assert torch.allclose(outputs(module), before, atol=1e-5)
    model.save(tmp_path / "out")
    assert torch.equal(outputs(type(module).from_pretrained(tmp_path / "out").eval()), outputs(module))


@pytest.mark.parametrize("name", KINDS)
def test_what_stays_computes_as_if_the_router_could_not_choose_the_others(name):
    module = tiny(name)
    data = batches(module)
    method, found, sums = looked(module, data)
    stay = method.kept(module, found, method.scores(module, found, sums))
    masked = copy.deepcopy(module)
    reach = {id(masked.get_submodule(units.scope).gate.weight): rows for units, rows in zip(found, stay, strict=True)}
    with pytest.MonkeyPatch.context() as patched:
        out_of_reach(patched, reach)
        expected = outputs(masked)
    mw.apply(module, Reap(share=0.25), data=data)
    assert torch.allclose(outputs(module), expected, atol=1e-5)


def test_with_fewer_experts_than_a_token_goes_to_it_goes_to_all(tmp_path):
    model = mw.apply(mw.open(tiny("mixtral")), Reap(share=0.9), data=batches(tiny("mixtral")))
    assert model.module.config.num_experts_per_tok == model.module.config.num_local_experts == 1
    assert any("tokens go to 1 experts, no longer to 2" in note for note in model.history[-1]["notes"])
    model.save(tmp_path / "out")
    assert torch.equal(outputs(type(model.module).from_pretrained(tmp_path / "out").eval()), outputs(model.module))


@pytest.mark.parametrize("name", KINDS)
@torch.no_grad()
def test_what_goes_is_averaged_into_the_nearest_that_stays(name):
    module = tiny(name)
    units = next(units for units in anatomy_of(module).units(module, "experts"))
    block = module.get_submodule(units.scope)
    gate, down = block.gate.weight, block.experts.down_proj
    gate[1] = 3 * gate[4]  # cosine 1 in each pair, and 6 is its own
    gate[7] = 2 * gate[0]
    rows = [0, 2, 3, 4, 5, 6]
    weights = torch.tensor([1.0, 3.0, 5.0, 5.0, 1.0, 5.0, 5.0, 0.0])
    before, router = down.clone(), gate.clone()
    merge_into(module, units, rows, weights.double())
    assert torch.allclose(down[4], (before[4] + 3 * before[1]) / 4, atol=1e-6)
    assert torch.allclose(gate[4], (router[4] + 3 * router[1]) / 4, atol=1e-6)
    assert torch.allclose(down[0], before[0], atol=1e-6)  # the other of its group counts for nothing
    assert torch.equal(down[6], before[6])
    merge_into(module, units, rows, torch.zeros(8).double())
    assert torch.allclose(gate[0], (router[0] + router[7]) / 2, atol=1e-6)


def test_experts_that_are_alike_are_merged_without_a_trace():
    module = tiny("mixtral")
    block = module.model.layers[0].mlp
    with torch.no_grad():  # each of the second four is one of the first four, and so is its row but for a little
        for value in (block.experts.gate_up_proj, block.experts.down_proj):
            value[4:] = value[:4]
    same = [value.clone() for value in (block.experts.gate_up_proj, block.experts.down_proj)]
    units = anatomy_of(module).units(module, "experts")[0]
    with torch.no_grad():
        block.gate.weight[4:] = block.gate.weight[:4] * 1.001
    merge_into(module, units, [0, 1, 2, 3], torch.rand(8, dtype=torch.float64))
    for value, before in zip((block.experts.gate_up_proj, block.experts.down_proj), same, strict=True):
        assert torch.allclose(value[:4], before[:4], atol=1e-6)


def test_merging_changes_what_stays_and_not_how_many(tmp_path):
    dropped, merged = (
        mw.apply(mw.open(tiny("qwen3_moe")), Reap(share=0.5, merge=merge), data=batches(tiny("qwen3_moe"))) for merge in (False, True)
    )
    one, two = dropped.module.state_dict(), merged.module.state_dict()
    assert {name: value.shape for name, value in one.items()} == {name: value.shape for name, value in two.items()}
    assert not torch.equal(outputs(dropped.module), outputs(merged.module))
    merged.save(tmp_path / "out")
    assert torch.equal(outputs(type(merged.module).from_pretrained(tmp_path / "out").eval()), outputs(merged.module))


def test_other_units_and_models_without_experts_are_refused():
    with pytest.raises(SettingError, match=r"units are experts; got mlp. Use prune.flap for others"):
        Reap(units=("mlp",))
    with pytest.raises(SiteError, match="no experts"):
        mw.apply(tiny("llama"), Reap(), data=batches(tiny("llama")))

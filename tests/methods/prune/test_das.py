import copy
import math

import pytest
import torch
from calibration import TEXT, batches, lettered
from tiny import outputs, tiny
from transformers import AutoModelForCausalLM

import modelwright as mw
from modelwright.anatomy import anatomy_of
from modelwright.blocks.adapter import Adapter
from modelwright.blocks.beside import Beside
from modelwright.blocks.removed import remove_branches, replace_branches
from modelwright.core import data as texts
from modelwright.core.errors import ModelError, PlanError, SettingError, WeightsError
from modelwright.core.given import Given
from modelwright.core.gradients import text_loss
from modelwright.core.measure import flops_per_token
from modelwright.core.model import Model
from modelwright.core.skipping import Search
from modelwright.methods.adapt.lora import Lora
from modelwright.methods.prune.das import Das

BRIEF = {"inner": 8, "beside": 4, "steps": 6, "batch": 2, "every": 1, "begin": 0.0, "end": 0.5}
IDS = torch.tensor([[3, 4, 5, 9, 11]])


def sure(**config):
    """A model that is sure of what it predicts, so that text of its own loses by most changes; and that text."""
    module = tiny(**config)
    with torch.no_grad():
        module.lm_head.weight *= 10
    return module, [{"input_ids": module.generate(torch.arange(1, 9)[:, None], max_new_tokens=20, do_sample=False)}]


def text_of(model):
    return Given(data=texts.read(TEXT), length=32, samples=16).batches(model)


def search_of(module, data, **settings):
    method = Das(**(BRIEF | settings))
    found = method.found(module)
    return Search(method, Model(name="", module=module), found, method.adapters(module, found), data, torch.Generator().manual_seed(0))


def test_a_case_by_hand():
    search = search_of(tiny(), [], mode="mlp", branches=2)
    # Mean reward 0.3, so that choices get 0.2, -0.1 and -0.1, times p (1 - p) = 1/4 of scores that are 0.
    search.learn([(0, 1), (1, 2), (0, 2)], [0.5, 0.2, 0.2])
    assert search.scores.tolist() == pytest.approx([0.025, 0.025, -0.05, 0.0])
    assert search.best() == (0, 1)


def test_choices_are_drawn_by_their_chances_and_without_replacement():
    search = search_of(tiny(), [], mode="mlp", branches=2)
    search.scores = torch.tensor([20.0, -20, 20, -20], dtype=torch.float64)
    assert {search.drawn() for _ in range(20)} == {(0, 2)}
    search.scores = torch.zeros(4, dtype=torch.float64)
    assert len({search.drawn() for _ in range(100)}) == 6


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2", "phi", "qwen3_moe"])
def test_adapters_begin_as_what_adds_nothing(kind):
    module = tiny(kind)
    search = search_of(module, [], branches=2)
    assert torch.equal(outputs(module), outputs(tiny(kind)))
    assert sum(isinstance(child, Beside) for child in module.modules()) == 8
    gone = [search.found[place] for place in (2, 5)]
    removed = tiny(kind)
    remove_branches(removed, gone)
    with search.replaced((2, 5)):
        assert torch.allclose(outputs(module), outputs(removed), atol=1e-6)
    assert torch.equal(outputs(module), outputs(tiny(kind)))


def test_what_is_replaced_does_not_run_and_costs_what_its_adapter_costs():
    module = tiny()
    before = flops_per_token(module)
    parts = [anatomy_of(module).branches(module)[place] for place in (0, 3)]
    calls = []
    for part in parts:
        module.get_submodule(part.module).register_forward_hook(lambda *_: calls.append(1))
    replace_branches(module, {part: Adapter(features=64, inner=8, gives=gives) for part, gives in zip(parts, ("pair", "sum"), strict=True)})
    outputs(module)
    assert not calls
    attention, mlp = 64 * 64 * 2 + 2 * 64 * 32, 3 * 64 * 160
    assert flops_per_token(module) == before - 2 * (attention + mlp) + 2 * 2 * 2 * 64 * 8


def test_a_part_whose_removal_never_hurts_is_found():
    module, _ = sure()
    with torch.no_grad():
        module.model.layers[2].mlp.down_proj.weight.zero_()
    data = [{"input_ids": module.generate(torch.arange(1, 9)[:, None], max_new_tokens=20, do_sample=False)}]
    search = search_of(module, data, mode="mlp", branches=1, draws=3, end=1.0)
    for done in range(1, 16):
        search.step(done, 16, {})
    assert int(search.scores.argmax()) == 2
    assert search.scores[2] > 0


def test_without_branches_only_adapters_beside_the_parts_learn():
    model = lettered()
    module = model.module
    before = {name: value.clone() for name, value in module.state_dict().items()}
    loss = text_loss(model, text_of(model))
    mw.apply(model, Das(**(BRIEF | {"branches": 0, "steps": 20, "learning_rate": 1e-2})), data=TEXT, length=32, samples=16)
    after = module.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    more = [name for name in after if name not in before]
    assert all(".beside.body." in name for name in more)
    assert sum(after[name].numel() for name in more) == 8 * (2 * 64 + 2 * 64 * 4 + 64 + 4)
    assert text_loss(model, text_of(model)) < loss - 0.5
    assert all(value.requires_grad for value in module.model.layers[0].self_attn.parameters())


def test_learning_makes_up_for_part_of_what_was_replaced():
    losses = []
    for steps in (1, 40):
        model = lettered()
        settings = BRIEF | {"steps": steps, "learning_rate": 1e-2, "branches": 2, "beside": 0, "end": 0.0}
        mw.apply(model, Das(**settings), data=TEXT, length=32, samples=16)
        losses.append(text_loss(model, text_of(model)))
    assert losses[1] < losses[0] - 0.5


def test_the_parts_of_the_largest_scores_are_replaced():
    module, data = sure()
    model = mw.apply(mw.open(module), Das(**(BRIEF | {"branches": 3})), data=data)
    note = model.history[-1]["notes"][0]
    named = note.partition("stand for ")[2].partition(";")[0].split(", ")
    parts = [text.rpartition(" (") for text in note.partition("scores ")[2].split(", ")]
    scores = {name: float(value.rstrip(")")) for name, _, value in parts}
    assert len(named) == 3
    assert min(scores[name] for name in named) >= max(score for name, score in scores.items() if name not in named)
    assert sum(isinstance(child, Adapter) for child in module.modules()) == 3
    assert not hasattr(module, "stands")


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2", "qwen3_moe"])
def test_it_is_saved_and_loads_after_the_import(kind, tmp_path):
    model = mw.apply(mw.open(tiny(kind)), Das(**(BRIEF | {"branches": 3})), data=batches(tiny(kind)))
    found = outputs(model.module)
    assert torch.equal(outputs(copy.deepcopy(model.module)), found)
    model.save(tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert torch.allclose(outputs(again), found, atol=1e-6)
    assert Model(name="", module=again).marks == set()
    with torch.no_grad():
        cached, anew = (again.generate(IDS, max_new_tokens=6, do_sample=False, use_cache=use) for use in (True, False))
    assert torch.equal(cached, anew)


def test_what_cannot_be_done_is_refused():
    data = batches(tiny())
    with pytest.raises(SettingError, match="branches and beside are 0, so nothing would learn"):
        Das(branches=0, beside=0)
    with pytest.raises(SettingError, match="begin is after end"):
        Das(begin=0.8)
    module = tiny()
    with pytest.raises(PlanError, match=r"prune\.das: 4 parts are to go, and of 4 not as many can"):
        mw.apply(module, Das(**(BRIEF | {"branches": 4, "mode": "mha"})), data=data)
    assert module.state_dict().keys() == tiny().state_dict().keys()
    with pytest.raises(PlanError, match="bears an adapter"):
        mw.apply(mw.open(tiny()), [Lora(rank=2), Das(**BRIEF)], data=data)


@pytest.mark.parametrize("settings", [{"branches": 1, "beside": 0}, {"branches": 0, "beside": 4}])
def test_adapters_that_have_learnt_do_not_begin_anew(settings):
    module = mw.apply(tiny(), Das(**(BRIEF | {"mode": "mlp"} | settings)), data=batches(tiny()))
    before = outputs(module)
    with pytest.raises(PlanError, match=r"prune\.das: this model has adapters that have learnt already"):
        mw.apply(module, Das(**(BRIEF | {"mode": "mlp", "branches": 1, "beside": 0})), data=batches(tiny()))
    assert torch.equal(outputs(module), before)


def test_scores_move_less_the_further_they_are_from_the_middle():
    search = search_of(tiny(), [], mode="mlp", branches=1, pull=2.0)
    search.scores = torch.tensor([0.0, 3.0, -1.0, 0.0], dtype=torch.float64)
    search.learn([(1,), (2,)], [0.4, 0.2])  # a mean of 0.3
    chances = [1 / (1 + math.exp(-score)) for score in (3.0, -1.0)]
    moved = [2 * 0.1 * chances[0] * (1 - chances[0]), -2 * 0.1 * chances[1] * (1 - chances[1])]
    assert search.scores.tolist() == pytest.approx([0.0, 3 + moved[0], -1 + moved[1], 0.0])


def test_choices_are_tried_within_the_search_at_every_so_many_steps():
    module, data = sure()
    search = search_of(module, data, mode="mlp", branches=1, every=3, begin=0.25, end=0.75)
    times = []
    for done in range(1, 13):
        before = search.scores.clone()
        search.step(done, 12, {})
        times += [done] * (not torch.equal(before, search.scores))
    assert times == [6, 9]


def test_a_model_on_which_it_fails_stays_as_it_was():
    module = tiny()
    with pytest.raises(WeightsError, match="not finite at step"):
        mw.apply(module, Das(**(BRIEF | {"branches": 1, "learning_rate": 1e38})), data=batches(tiny()))
    assert module.state_dict().keys() == tiny().state_dict().keys()
    assert torch.equal(outputs(module), outputs(tiny()))
    module.model.layers[1].mlp.down_proj.weight.data *= torch.inf
    with pytest.raises(ModelError, match=r"prune\.das: the loss of .* on the text is nan"):
        mw.apply(module, Das(**BRIEF), data=batches(tiny()))
    assert module.state_dict().keys() == tiny().state_dict().keys()

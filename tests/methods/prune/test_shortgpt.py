import pytest
import torch
from calibration import batches, normal
from tiny import outputs, tiny, tiny_inputs
from transformers import AutoModelForCausalLM

import modelwright as mw
from modelwright.core.errors import PlanError
from modelwright.core.given import Given
from modelwright.core.walk import change
from modelwright.methods.prune.shortgpt import ShortGpt


def idle(model, depth):
    """Let a block add nothing to what enters it."""
    block = model.model.layers[depth]
    block.self_attn.o_proj.weight.data.zero_()
    block.mlp.down_proj.weight.data.zero_()
    return model


def scores(model, data):
    opened = mw.open(model)
    change(opened, ShortGpt(blocks=0), Given(data=data))
    note = next(note for note in opened.history[-1]["notes"] if "scores of all blocks" in note)
    return [float(score) for score in note.partition("scores of all blocks ")[2].split(", ")]


def test_a_case_by_hand():
    # Cosines of the tokens: (1, 0)·(2, 0) → 1; (0, 3)·(4, 3) → 9/15 = 0.6; (1, 1)·(-1, 1) → 0. Influence 1 - 1.6/3.
    before = torch.tensor([[1.0, 0.0], [0.0, 3.0], [1.0, 1.0]])
    after = torch.tensor([[2.0, 0.0], [4.0, 3.0], [-1.0, 1.0]])
    assert ShortGpt().block(before, after).item() == pytest.approx(1 - 1.6 / 3)
    # Of the influences 0.5 0.1 0.4 0.2 the lowest two go: blocks 1 and 3.
    assert ShortGpt(blocks=2).keep([0.5, 0.1, 0.4, 0.2]) == [0, 2]


def test_a_block_that_changes_nothing_has_no_influence():
    hidden = normal(50, 16)
    assert ShortGpt().block(hidden, hidden).item() == pytest.approx(0, abs=1e-6)


def test_the_order_of_the_tokens_does_not_matter():
    before, after = normal(50, 16), normal(50, 16, seed=1)
    order = torch.randperm(50, generator=torch.Generator().manual_seed(0))
    assert ShortGpt().block(before[order], after[order]).item() == pytest.approx(ShortGpt().block(before, after).item(), rel=1e-5)


@pytest.mark.parametrize("depth", [0, 2, 3])
def test_removing_a_block_that_changes_nothing_leaves_the_logits(depth):
    model = idle(tiny(), depth)
    expected = outputs(model)
    assert scores(idle(tiny(), depth), batches(model))[depth] == 0
    mw.apply(model, ShortGpt(blocks=1), data=batches(model))
    assert len(model.model.layers) == 3
    assert (outputs(model) - expected).abs().max() < 1e-5


def test_padding_has_no_influence():
    data = tiny_inputs(tiny())
    rows = [{"input_ids": data["input_ids"][:1]}, {"input_ids": data["input_ids"][1:, :7]}]
    assert scores(tiny(), [data]) == pytest.approx(scores(tiny(), rows), abs=2e-4)


@pytest.mark.parametrize("kind", ["gemma2", "qwen2"])
def test_the_shorter_model_is_a_plain_one_of_its_family(kind, tmp_path):
    # Blocks, their places in the cache and the config's list by block are those of the kept ones, here 0, 2 and 3.
    model = mw.open(tiny(kind))
    kinds = model.config.layer_types
    model.module.model.layers[1].self_attn.o_proj.weight.data.zero_()
    model.module.model.layers[1].mlp.down_proj.weight.data.zero_()
    if kind == "gemma2":
        assert len(set(kinds)) == 2
    expected = outputs(model.module)
    mw.apply(model, ShortGpt(blocks=1), data=batches(model.module)).save(tmp_path / "short")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "short").eval()
    assert plain.config.num_hidden_layers == 3
    assert plain.config.layer_types == [kinds[0], kinds[2], kinds[3]]
    assert (outputs(plain) - expected).abs().max() < 1e-5
    ids = torch.tensor([[3, 4, 5]])
    with torch.no_grad():
        cached = plain.generate(ids, max_new_tokens=4, do_sample=False, use_cache=True)
        anew = plain.generate(ids, max_new_tokens=4, do_sample=False, use_cache=False)
    assert torch.equal(cached, anew)


@pytest.mark.parametrize("measure", ["influence", "angle"])
def test_removing_every_block_is_refused(measure):
    for blocks in (4, 9):
        with pytest.raises(PlanError, match="all 4 blocks"):
            mw.apply(tiny(), ShortGpt(blocks=blocks, measure=measure), data=batches(tiny()))


def test_angles_by_hand():
    # Angles of the tokens: (1, 0) and (0, 2) → 1/2; (1, 0) and (1, 1) → 1/4; (1, 2) and (-2, -4) → 1. Mean 7/12.
    before = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 2.0]])
    after = torch.tensor([[0.0, 2.0], [1.0, 1.0], [-2.0, -4.0]])
    assert ShortGpt(measure="angle").block(before, after).item() == pytest.approx(7 / 12)
    # Of five blocks, the runs of two begin at 0 to 3; the third turns least: blocks 2 and 3 go.
    assert ShortGpt(measure="angle", blocks=2).keep([0.4, 0.3, 0.1, 0.2]) == [0, 1, 4]
    assert ShortGpt(measure="angle", blocks=0).keep([0.4, 0.3, 0.1]) == [0, 1, 2]


@torch.no_grad()
def test_the_angle_of_a_run_is_that_of_the_last_tokens_that_enter_and_leave_it():
    module = tiny()
    data = batches(module)
    states = []
    for batch in data:
        blocks = []
        handles = [block.register_forward_pre_hook(lambda _, args, found=blocks: found.append(args[0])) for block in module.model.layers]
        handles.append(module.model.norm.register_forward_pre_hook(lambda _, args, found=blocks: found.append(args[0])))
        module(**batch)
        ends = batch["attention_mask"].sum(1) - 1
        states.append(torch.stack([found[[0, 1], ends] for found in blocks]))
        for handle in handles:
            handle.remove()
    states = torch.cat(states, 1).double()
    units = states / states.norm(dim=-1, keepdim=True)
    angles = [float((units[depth] * units[depth + 2]).sum(-1).arccos().mean() / torch.pi) for depth in range(3)]
    opened = mw.open(module)
    mw.apply(opened, ShortGpt(blocks=2, measure="angle"), data=data)
    note = next(note for note in opened.history[-1]["notes"] if "runs of 2 blocks" in note)
    found = [float(score) for score in note.partition("scores of all runs of 2 blocks ")[2].split(", ")]
    assert found == pytest.approx(angles, abs=1e-4)
    least = angles.index(min(angles))
    assert f"blocks removed {[least, least + 1]}" in note


def test_a_run_that_turns_nothing_leaves_without_a_trace(tmp_path):
    model = idle(idle(tiny(), 1), 2)
    expected = outputs(model)
    opened = mw.open(model)
    opened.save(tmp_path / "in")
    streamed = mw.apply(tmp_path / "in", ShortGpt(blocks=2, measure="angle"), data=batches(model), save=tmp_path / "out")
    mw.apply(opened, ShortGpt(blocks=2, measure="angle"), data=batches(model))
    assert len(model.model.layers) == 2
    assert (outputs(model) - expected).abs().max() < 1e-5
    assert torch.equal(outputs(streamed.module), outputs(model))

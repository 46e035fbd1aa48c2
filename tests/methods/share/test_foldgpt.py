"""Gates on blocks, removal of those that close, and sharing of what stays."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import modelwright as mw
from modelwright.anatomy.removal import remove_blocks, remove_units
from modelwright.core import measure, sharing, tiny
from modelwright.core.errors import DataError, ModelError, PlanError, SiteError
from modelwright.core.model import Model, open
from modelwright.methods.factor.svd import Svd
from modelwright.methods.share.depth import Depth
from modelwright.methods.share.foldgpt import FoldGpt, gated, polarised

BATCHES = [tiny.tiny_inputs(tiny.tiny(), seed) for seed in range(2)]


@pytest.mark.parametrize("kind", ["llama", "gpt2", "phi", "olmoe"])
def test_open_gates_change_nothing_and_a_shut_one_is_a_block_removed(kind):
    module = tiny.tiny(kind)
    blocks = module.get_submodule(mw.anatomy.anatomy_of(module).blocks(module))
    before = tiny.outputs(module)
    with gated(blocks, torch.ones(4)):
        assert torch.equal(tiny.outputs(module), before)
    with gated(blocks, torch.tensor([1.0, 1.0, 0.0, 1.0])):
        shut = tiny.outputs(module)
    assert not torch.allclose(shut, before, atol=1e-3)
    assert torch.equal(tiny.outputs(module), before)
    remove_blocks(module, [2])
    assert torch.allclose(tiny.outputs(module), shut, atol=1e-5)


def test_a_gate_between_mixes_what_enters_and_what_leaves():
    block = nn.Linear(3, 3)
    x = torch.randn(2, 3)
    with gated([block], torch.tensor([0.25])):
        assert torch.allclose(block(x), 0.75 * x + 0.25 * nn.functional.linear(x, block.weight, block.bias), atol=1e-6)


def test_gates_by_hand():
    assert polarised(torch.tensor([0.0, 0.1, -0.1, 2.0]), 0.01).tolist() == pytest.approx([0, 0.5, 0.5, 4 / 4.01])


def test_the_block_that_does_nothing_goes():
    """On text that the model itself wrote every block serves but the idle one, whose gate feels the push alone."""
    module = tiny.tiny()
    with torch.no_grad():
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            module.model.layers[1].get_submodule(name).weight.zero_()
        module.lm_head.weight.mul_(8)  # so that it is sure of what it writes
        ids = module.generate(torch.arange(1, 9)[:, None], max_new_tokens=16, do_sample=False, use_cache=False)
    kept = [module.model.layers[depth] for depth in (0, 2, 3)]
    before = tiny.outputs(module)
    mw.apply(module, FoldGpt(blocks=1, loops=1), data=[{"input_ids": ids}])
    assert list(module.model.layers) == kept
    assert torch.allclose(tiny.outputs(module), before, atol=1e-5)


def test_gates_that_had_no_time_to_close_are_remarked_on():
    model = Model(name="llama", module=tiny.tiny())
    mw.apply(model, FoldGpt(blocks=2, loops=1, steps=3), data=BATCHES)
    assert "Take more steps" in model.history[-1]["notes"][-1]


def test_gates_are_learnt_and_weights_are_not():
    module = tiny.tiny()
    module.lm_head.weight.requires_grad_(False)
    before = {name: value.clone() for name, value in module.named_parameters()}
    gates = FoldGpt(steps=8).learnt(Model(name="llama", module=module), BATCHES)
    assert gates.shape == (4,)
    assert ((gates > 0) & (gates < 1)).all()
    assert len(set(gates.tolist())) == 4
    for name, value in module.named_parameters():
        assert torch.equal(value, before[name])
        assert value.grad is None
        assert value.requires_grad == (name != "lm_head.weight")


def test_without_removal_it_is_depth_sharing():
    settings = {"loops": 2, "spare_first": 0, "spare_last": 0, "member": "mean"}
    one = mw.apply(tiny.tiny(), FoldGpt(blocks=0, **settings), data=BATCHES)
    two = mw.apply(tiny.tiny(), Depth(**settings))
    assert sharing.shared(one) == sharing.shared(two)
    assert torch.equal(tiny.outputs(one), tiny.outputs(two))


def test_unique_parameters_are_those_of_groups_of_what_stays():
    module = mw.apply(tiny.tiny(), FoldGpt(blocks=2, loops=2, spare_first=0, spare_last=0, steps=2), data=BATCHES)
    one = tiny.tiny(num_hidden_layers=1)
    assert measure.count(module)[0] == measure.count(one)[0] + 2 * 64  # the second block's norms
    assert module.config.num_hidden_layers == 2


def test_what_cannot_be_is_refused_before_gates_are_learnt():
    with pytest.raises(PlanError, match="4 blocks are to go, and there are 4"):
        mw.apply(tiny.tiny(), FoldGpt(blocks=4), data=BATCHES)
    with pytest.raises(PlanError, match="of 3 blocks, 1 at the start and 1 at the end"):
        mw.apply(tiny.tiny(), FoldGpt(blocks=1), data=BATCHES)
    with pytest.raises(DataError, match="no token that follows another"):
        mw.apply(tiny.tiny(), FoldGpt(blocks=1, loops=1), data=[{"input_ids": torch.tensor([[5]])}])


def test_blocks_that_cannot_share_are_refused_before_any_leaves(monkeypatch):
    module = mw.apply(tiny.tiny(), Svd(where="mlp.up"))
    before = tiny.outputs(module)
    with monkeypatch.context() as patch:
        patch.setattr(FoldGpt, "learnt", lambda *_: pytest.fail("the gates have been learnt for nothing"))
        with pytest.raises(SiteError, match=r"share.foldgpt: mlp.up_proj of block 0 is a LowRankLinear. Share first"):
            mw.apply(module, FoldGpt(blocks=1, spare_first=0), data=BATCHES)
    # Which of these blocks is left to share is known only once the gates are.
    odd = tiny.tiny()
    remove_units(odd, "mlp", {2: range(100)}, plain=False)
    gates = torch.tensor([0.1, 0.9, 0.8, 0.7])
    monkeypatch.setattr(FoldGpt, "learnt", lambda *_: gates)
    whole = tiny.outputs(odd)
    with pytest.raises(SiteError, match="blocks 1 and 2 differ in mlp.gate_proj.weight"):
        mw.apply(odd, FoldGpt(blocks=1, spare_first=0), data=BATCHES)
    assert torch.equal(tiny.outputs(odd), whole)
    assert torch.equal(tiny.outputs(module), before)
    gates[2] = 0.0
    mw.apply(odd, FoldGpt(blocks=1, spare_first=0), data=BATCHES)
    names = sharing.shared(odd)
    assert len(names) == 7
    assert all(alias.startswith("model.layers.1.") and name.startswith("model.layers.0.") for alias, name in names.items())


def test_it_works_in_a_recipe_with_a_cure_and_is_planned(small, text, tmp_path):
    recipe = {
        "model": str(small),
        "data": str(text),
        "samples": 4,
        "length": 16,
        "steps": [
            {"share.foldgpt": {"spare_first": 0, "steps": 2}},
            {"distill.recover": {"teacher": "$input", "tokens": 64, "batch": 2, "length": 16}},
        ],
        "save": str(tmp_path / "out"),
    }
    rows = mw.plan(recipe).rows
    mw.run(recipe)
    made = open(tmp_path / "out")
    assert measure.sizes(made)["parameters"] == rows[-1].parameters < rows[0].parameters
    assert measure.sizes(made)["flops_per_token"] == rows[-1].flops_per_token < rows[0].flops_per_token
    assert len(set(sharing.shared(made.module).values())) == 7


def test_the_gates_are_learnt_as_the_card_says():
    module, method = tiny.tiny(), FoldGpt(blocks=1, steps=4, learning_rate=0.03, push=3.0)
    phi = torch.ones(4, requires_grad=True)
    optimizer = torch.optim.Adam([phi])
    for step, epsilon in enumerate((0.1, 0.1 * 0.01 ** (1 / 3), 0.1 * 0.01 ** (2 / 3), 1e-3)):
        gates, batch = phi**2 / (phi**2 + epsilon), BATCHES[step % 2]
        with gated(module.model.layers, gates):
            logits = module(**batch, use_cache=False).logits
        targets = batch["input_ids"][:, 1:].masked_fill(batch["attention_mask"][:, 1:] == 0, -100)
        text = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        (text + 3.0 * (gates.mean() - 0.75).abs()).backward()
        optimizer.param_groups[0]["lr"] = 0.03 * (epsilon / 0.1) ** 0.5
        optimizer.step()
    expected = polarised(phi.detach(), 1e-3)
    assert torch.allclose(method.learnt(Model(name="llama", module=tiny.tiny()), BATCHES), expected, atol=1e-6)


def test_a_loss_that_is_not_finite_removes_nothing():
    module = tiny.tiny()
    module.model.layers[1].mlp.down_proj.weight.data *= torch.inf
    with pytest.raises(ModelError, match=r"share\.foldgpt: the loss on the text is nan"):
        mw.apply(module, FoldGpt(blocks=1, loops=1), data=BATCHES)
    assert len(module.model.layers) == 4
    assert all(value.requires_grad for value in module.parameters())

"""Blocks that use one block's weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import modelwright as mw
from modelwright.core import measure, sharing, tiny
from modelwright.core.errors import ModelwrightError, PlanError, SettingError, SiteError
from modelwright.core.model import Model, open, stored_bytes
from modelwright.methods.factor.svd import Svd
from modelwright.methods.share.depth import Depth

NORMS = 2 * 64


def shared(module: nn.Module, **settings) -> nn.Module:
    return mw.apply(module, Depth(**{"spare_first": 0, "spare_last": 0, **settings}))


def values(module: nn.Module, depth: int) -> dict[str, torch.Tensor]:
    return dict(module.model.layers[depth].named_parameters())


def test_unique_parameters_are_those_of_one_block_for_each_group_and_all_norms():
    before = measure.count(tiny.tiny())[0]
    block = sum(value.numel() for value in values(tiny.tiny(), 0).values())
    assert measure.count(shared(tiny.tiny(), loops=2))[0] == before - 2 * (block - NORMS)
    assert measure.count(shared(tiny.tiny(), loops=4))[0] == before - 3 * (block - NORMS)


@pytest.mark.parametrize("member", ["first", "last", "mean"])
def test_the_forward_is_that_of_a_model_with_copied_weights(member):
    copied = tiny.tiny()
    with torch.no_grad():
        for pair in ((0, 1), (2, 3)):
            one, two = (values(copied, depth) for depth in pair)
            for name in one:
                if "norm" not in name:
                    found = {"first": one[name], "last": two[name], "mean": (one[name] + two[name]) / 2}[member].clone()
                    one[name].copy_(found)
                    two[name].copy_(found)
    assert torch.equal(tiny.outputs(shared(tiny.tiny(), member=member)), tiny.outputs(copied))


def test_norms_stay_each_blocks_own():
    before, after = tiny.tiny("qwen3"), shared(tiny.tiny("qwen3"), loops=4)
    for depth in range(4):
        for name, value in values(after, depth).items():
            assert ("norm" in name) == (value is not values(after, 0)[name]) or depth == 0
            if "norm" in name:
                assert torch.equal(value, values(before, depth)[name])


def test_spared_blocks_keep_their_own_and_the_last_group_may_be_shorter():
    module = shared(tiny.tiny(num_hidden_layers=7), loops=2, spare_first=1, spare_last=1)
    owners = [id(values(module, depth)["mlp.up_proj.weight"]) for depth in range(7)]
    assert [owners.index(owner) for owner in owners] == [0, 1, 1, 3, 3, 5, 6]


def test_roles_can_be_chosen():
    names = set(sharing.shared(shared(tiny.tiny(), where="attn", skip="attn.o")))
    assert {name.rsplit(".", 2)[1] for name in names} == {"q_proj", "k_proj", "v_proj"}


def test_biases_go_with_their_matrices():
    module = shared(tiny.tiny("gpt2"))
    assert module.transformer.h[1].mlp.c_fc.bias is module.transformer.h[0].mlp.c_fc.bias


@pytest.mark.parametrize("kind", ["gpt2", "gemma2", "phi3", "gpt_neox", "opt", "bert", "vit", "qwen3_moe", "mixtral", "olmoe"])
def test_every_family_comes_back_from_disk(kind, tmp_path):
    model = Model(name=kind, module=tiny.tiny(kind))
    mw.apply(model, Depth(spare_last=0))
    before = tiny.outputs(model.module)
    model.save(tmp_path / "out")
    loaded = open(tmp_path / "out")
    assert torch.allclose(tiny.outputs(loaded.module), before, atol=1e-5)
    assert sharing.shared(loaded.module) == sharing.shared(model.module)
    assert stored_bytes(loaded.module) == stored_bytes(model.module)


@pytest.mark.parametrize("kind", ["llama", "qwen3_moe"])
def test_stored_dense_it_is_the_same_function_for_plain_transformers(kind, tmp_path):
    from transformers import AutoModelForCausalLM

    tied, dense = (shared(tiny.tiny(kind), store=store) for store in ("shared", "dense"))
    assert torch.allclose(tiny.outputs(tied), tiny.outputs(dense), atol=1e-5)
    assert sharing.shared(dense) == {}
    assert stored_bytes(dense) == stored_bytes(tiny.tiny(kind))
    dense.save_pretrained(tmp_path / "out")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.allclose(tiny.outputs(plain), tiny.outputs(dense), atol=1e-6)


def test_every_executed_block_has_its_place_in_the_cache():
    module = shared(tiny.tiny(), loops=4)
    ids = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])
    with torch.no_grad():
        whole = module(ids).logits[:, -1]
        start = module(ids[:, :-1], use_cache=True)
        assert len(start.past_key_values.layers) == 4
        assert torch.allclose(module(ids[:, -1:], past_key_values=start.past_key_values).logits[:, -1], whole, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "config", "settings", "words"),
    [
        ("llama", {}, {"spare_first": 2, "spare_last": 1}, "of 4 blocks, 2 at the start and 1 at the end"),
        ("llama", {}, {"where": "experts"}, "chooses no weight of block 0"),
        ("qwen2_moe", {}, {}, "blocks 0 and 1 differ in mlp"),
        ("t5", {}, {}, "no single row of"),
    ],
)
def test_what_cannot_share_is_refused_and_stays_as_it_was(kind, config, settings, words):
    module = tiny.tiny(kind, **config)
    before = {name: value.clone() for name, value in module.named_parameters()}
    with pytest.raises(ModelwrightError, match=words):
        shared(module, **settings)
    after = dict(module.named_parameters())
    assert after.keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in after.items())
    assert sharing.shared(module) == {}


def test_stored_layers_are_not_shared_and_adapters_neither():
    module = mw.apply(tiny.tiny(), Svd(where="mlp.up"))
    with pytest.raises(SiteError, match=r"mlp.up_proj of block 0 is a LowRankLinear. Share first"):
        shared(module)
    adapted = Model(name="llama", module=tiny.tiny())
    mw.apply(adapted, mw.core.find.find("adapt.lora")(rank=2))
    with pytest.raises(PlanError, match="bears adapters"):
        mw.apply(adapted, Depth())
    with pytest.raises(SettingError, match="loops"):
        Depth(loops=0)


def test_it_works_in_a_recipe_and_its_bytes_are_planned(small, text, tmp_path):
    recipe = {
        "model": str(small),
        "data": str(text),
        "steps": [{"share.depth": {"spare_first": 0}}, {"quantize.rtn": {"bits": 8}}],
        "save": str(tmp_path / "out"),
    }
    rows = mw.plan(recipe).rows
    assert "after `import modelwright`" in rows[1].notes[-1]
    mw.run(recipe)
    made = open(tmp_path / "out")
    assert stored_bytes(made.module) == rows[-1].bytes < rows[1].bytes < rows[0].bytes
    assert sharing.shared(made.module)

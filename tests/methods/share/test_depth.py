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


# What each use of a shared block has of its own

OWN = {"residual_scales": True, "projection": 1.5}


def test_parameters_do_not_grow_with_the_loops_but_for_what_each_use_has_of_its_own():
    def parts(uses):
        module = shared(tiny.tiny(num_hidden_layers=2 * uses), loops=uses, **OWN)
        own = sum(v.numel() for n, v in module.named_parameters() if "recursion" in n)
        return measure.count(module)[0] - own - 2 * uses * NORMS, own

    (one, own), (other, more) = parts(2), parts(4)
    assert one == other
    each = 4 + 2 + 2 * 64 + 2 * 64 * 96 + 96 + 64  # four scalars, the projection's two, its norm, matrices and biases
    assert (own, more) == (4 * each, 8 * each)
    assert one == measure.count(tiny.tiny(num_hidden_layers=2))[0] - 2 * NORMS


@pytest.mark.parametrize("kind", ["llama", "gpt2", "vit", "qwen3_moe", "gemma", "gpt_neox"])
def test_with_scalars_of_one_and_new_projections_it_is_the_model_that_shares(kind):
    assert torch.equal(tiny.outputs(shared(tiny.tiny(kind), **OWN)), tiny.outputs(shared(tiny.tiny(kind))))


def test_a_shared_model_is_that_of_copied_weights_with_the_formula_written_out():
    module = shared(tiny.tiny("vit"), loops=2, **OWN)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, value in module.named_parameters():
            if "recursion" in name:
                value.add_(0.3 * torch.randn(value.shape, generator=generator))
    inputs = tiny.tiny_inputs(module)
    with torch.no_grad():
        x = module.vit.embeddings(inputs["pixel_values"])
        for block in module.vit.layers:
            own = block.recursion
            x = own.scales[0] * x + own.scales[1] * block.attention(block.layernorm_before(x))[0]
            x = own.scales[2] * x + own.scales[3] * block.mlp(block.layernorm_after(x))
            small = nn.functional.gelu(own.body.down(own.body.entry(x)))
            x = own.projection_scales[0] * x + own.projection_scales[1] * own.body.up(small)
        expected = module.classifier(module.vit.layernorm(x)[:, 0])
    assert torch.allclose(tiny.outputs(module), expected, atol=1e-5)


def test_each_use_learns_its_own_and_the_block_from_both(text):
    from calibration import lettered

    from modelwright.methods.train import Train

    model = lettered()
    mw.apply(model, Depth(spare_first=0, spare_last=0, **OWN))
    before = {name: value.clone() for name, value in model.module.state_dict().items()}
    mw.apply(model, Train(tokens=512, batch=2, length=16, learning_rate=0.01), data=text)
    after = model.module.state_dict()
    for leaf in ("recursion.scales", "recursion.projection_scales", "recursion.body.up.weight", "mlp.up_proj.weight"):
        one, two = (f"model.layers.{depth}.{leaf}" for depth in (0, 1))
        assert not torch.equal(after[one], before[one])
        assert torch.equal(after[one], after[two]) == leaf.startswith("mlp")


@pytest.mark.parametrize(
    ("kind", "settings"),
    [("llama", OWN), ("llama", {"residual_scales": True}), ("gpt2", {"projection": 0.5}), ("vit", OWN | {"slices": 2, "slices_again": 4}),
     ("vit", {"slices": 3}), ("qwen3_moe", OWN)],
)  # fmt: skip
def test_it_comes_back_from_disk_and_its_bytes_are_planned(kind, settings, tmp_path):
    from modelwright.core import plan
    from modelwright.core.given import Given
    from modelwright.core.model import emptied

    model, method = Model(name=kind, module=tiny.tiny(kind)), Depth(spare_last=0, **settings)
    with torch.no_grad():
        planned, _ = plan.predict(emptied(model.module), method, Given())
    mw.apply(model, method)
    assert stored_bytes(planned) == stored_bytes(model.module)
    with torch.no_grad():
        for name, value in model.module.named_parameters():
            if "recursion" in name:
                value.add_(0.1)
    before = tiny.outputs(model.module)
    model.save(tmp_path / "out")
    loaded = open(tmp_path / "out")
    assert torch.allclose(tiny.outputs(loaded.module), before, atol=1e-5)
    again = type(model.module).from_pretrained(tmp_path / "out").eval()  # plain transformers, after `import modelwright`
    assert torch.allclose(tiny.outputs(again), before, atol=1e-5)


def test_the_first_use_attends_within_consecutive_tokens_and_further_ones_within_random_ones():
    module = shared(tiny.tiny("vit"), loops=2, slices=4, slices_again=2)
    guests = [block.attention.slices for block in module.vit.layers]
    assert [guest.groups for guest in guests] == [4, 2, 4, 2]
    assert [guest.seed is None for guest in guests] == [True, False, True, False]
    assert guests[1].seed != guests[3].seed
    same = shared(tiny.tiny("vit"), loops=2, slices=4, slices_again=2)
    assert torch.equal(tiny.outputs(same), tiny.outputs(module))
    assert not torch.allclose(tiny.outputs(shared(tiny.tiny("vit"))), tiny.outputs(module), atol=1e-3)


@pytest.mark.parametrize(
    ("kind", "settings", "words"),
    [
        ("llama", {"slices": 2}, "slices are for those that see all"),
        ("olmo2", {"residual_scales": True}, "laid out otherwise than with one norm before it"),
        ("gemma2", {"residual_scales": True}, "laid out otherwise than with one norm before it"),
        ("phi", {"residual_scales": True}, "laid out otherwise than with one norm before it"),
        ("bert", {"slices_again": 2}, "laid out otherwise"),
        ("opt", {"residual_scales": True}, "laid out otherwise"),
    ],
)
def test_what_cannot_have_its_own_is_refused_and_stays_as_it_was(kind, settings, words):
    module = tiny.tiny(kind)
    before = tiny.outputs(module)
    with pytest.raises(SiteError, match=words):
        shared(module, **settings)
    assert torch.equal(tiny.outputs(module), before)
    assert sharing.shared(module) == {}


def test_a_plain_model_has_nothing_of_its_own_and_twice_is_refused():
    with pytest.raises(SettingError, match="store: dense writes a plain model"):
        Depth(store="dense", projection=1.0)
    module = shared(tiny.tiny(), residual_scales=True)
    with pytest.raises(SiteError, match="is a Recursion"):
        shared(module)


def test_several_steps_slice_the_stages_of_a_model_each_in_its_way(tmp_path):
    model = Model(name="vit", module=tiny.tiny("vit"))
    mw.apply(model, [Depth(spare_first=0, spare_last=2, slices=8, slices_again=2), Depth(spare_first=2, spare_last=0, slices=4)])
    held = [getattr(block.attention, "slices", None) for block in model.module.vit.layers]
    assert [guest and guest.groups for guest in held] == [8, 2, 4, None]
    model.save(tmp_path / "out")
    assert torch.allclose(tiny.outputs(open(tmp_path / "out").module), tiny.outputs(model.module), atol=1e-6)

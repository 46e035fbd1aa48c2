import copy
import math
import re

import pytest
import torch
from calibration import batches
from tiny import outputs, tiny
from transformers import AutoModelForCausalLM

import modelwright as mw
from modelwright.anatomy import anatomy_of
from modelwright.blocks.removed import Removed, remove_branches, without
from modelwright.core.errors import ModelError, PlanError, SettingError, SiteError
from modelwright.core.gradients import text_loss
from modelwright.core.measure import count
from modelwright.core.model import Model
from modelwright.methods.prune.blockpruner import BlockPruner, influences
from modelwright.methods.prune.shortgpt import ShortGpt

KINDS = ["llama", "gemma", "gemma2", "qwen3", "olmo2", "phi", "phi3", "gpt2", "gpt_neox", "mixtral", "qwen3_moe"]
IDS = torch.tensor([[3, 4, 5, 9, 11]])


def silenced(module, branches):
    """A copy in which these branches add zeros."""
    made = copy.deepcopy(module)
    for branch in branches:
        first = branch.kind == "attn"
        made.get_submodule(branch.module).register_forward_hook(
            lambda _, args, out, first=first: (torch.zeros_like(out[0]), out[1]) if first else torch.zeros_like(out)
        )
    return made


def pruned(kind="llama", data=None, **settings):
    """The model, and (what went, the perplexity after it) in order, as the notes say."""
    model = Model(name=kind, module=tiny(kind))
    mw.apply(model, BlockPruner(**settings), data=data or batches(model.module))
    note = next(note for note in model.history[-1]["notes"] if "in this order" in note)
    return model, [(f"{kind} {depth}", float(value)) for kind, depth, value in re.findall(r"(attn|mlp) (\d+) \(([^)]+)\)", note)]


def greedy(number):
    with torch.no_grad():
        cached = number.generate(IDS, max_new_tokens=6, do_sample=False, use_cache=True)
        anew = number.generate(IDS, max_new_tokens=6, do_sample=False, use_cache=False)
    return cached, anew


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_taken_out_is_what_adds_zeros(kind):
    module = tiny(kind)
    branches = anatomy_of(module).branches(module)
    assert [str(branch) for branch in branches] == [f"{part} {depth}" for depth in range(4) for part in ("attn", "mlp")]
    gone = [branches[0], branches[3], branches[6]]
    expected = outputs(silenced(module, gone))
    assert (outputs(module) - expected).abs().max() > 1e-3
    remove_branches(module, gone)
    assert torch.allclose(outputs(module), expected, atol=1e-5)
    assert not any(True for path in (one.module for one in gone) for _ in module.get_submodule(path).parameters())


def test_norms_go_with_the_part_that_they_serve_alone():
    for kind, norms in {"llama": 1, "gemma2": 2, "olmo2": 1, "gpt2": 1, "phi": 0}.items():
        module = tiny(kind)
        branches = anatomy_of(module).branches(module)
        assert {len(branch.norms) for branch in branches} == {norms}, kind
        assert len({norm for branch in branches for norm in branch.norms}) == 8 * norms
    llama = anatomy_of(tiny()).branches(tiny())
    assert llama[2].norms == ("model.layers.1.input_layernorm",)
    assert llama[3].norms == ("model.layers.1.post_attention_layernorm",)


@pytest.mark.parametrize(("kind", "which"), [("llama", (0,)), ("gemma2", (0, 2)), ("gpt2", (0, 5)), ("gpt_neox", (0, 2)), ("phi", (4, 6))])
def test_generation_with_a_cache_and_without_agree_and_survive_saving(kind, which, tmp_path):
    module = tiny(kind)
    branches = anatomy_of(module).branches(module)
    gone = [branches[place] for place in which]
    expected, _ = greedy(silenced(module, gone))
    remove_branches(module, gone)
    cached, anew = greedy(module)
    assert torch.equal(cached, expected)
    assert torch.equal(cached, anew)
    model = Model(name=kind, module=module)
    model.save(tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert torch.equal(outputs(again), outputs(module))
    assert all(torch.equal(found, expected) for found in greedy(again))


def test_a_removed_attention_has_no_place_in_the_cache():
    module = tiny()
    remove_branches(module, [branch for branch in anatomy_of(module).branches(module) if branch.kind == "attn"][:2])
    with torch.no_grad():
        cache = module(IDS, use_cache=True).past_key_values
    assert [layer.get_seq_length() for layer in cache.layers] == [5, 5, 0, 0]
    assert [layer.self_attn.layer_idx for layer in module.model.layers[2:]] == [0, 1]


def test_places_are_kept_apart_by_kind_of_attention():
    module = tiny("gemma2", num_hidden_layers=6)
    kinds = module.config.layer_types
    assert kinds == ["sliding_attention", "full_attention"] * 3
    branches = [branch for branch in anatomy_of(module).branches(module) if branch.kind == "attn"]
    remove_branches(module, [branches[0], branches[3]])
    found = [getattr(layer.self_attn, "layer_idx", None) for layer in module.model.layers]
    assert found == [None, 1, 0, None, 2, 3]
    assert all(kinds[slot] == kinds[depth] for depth, slot in enumerate(found) if slot is not None)


def test_blocks_that_leave_later_number_the_places_anew(tmp_path):
    module = tiny()
    attentions = [branch for branch in anatomy_of(module).branches(module) if branch.kind == "attn"]
    remove_branches(module, attentions[:1])
    model = Model(name="llama", module=module)
    mw.apply(model, ShortGpt(blocks=1), data=batches(module))
    assert len(module.model.layers) == 3
    cached, anew = greedy(module)
    assert torch.equal(cached, anew)
    model.save(tmp_path / "out")
    assert torch.equal(outputs(mw.open(tmp_path / "out").module), outputs(module))


def test_a_block_that_has_lost_both_leaves_whole(tmp_path):
    module = tiny()
    branches = anatomy_of(module).branches(module)
    expected = outputs(silenced(module, branches[2:4]))
    remove_branches(module, branches[2:4])
    assert module.config.num_hidden_layers == 3
    assert not [child for child in module.modules() if isinstance(child, Removed)]
    assert torch.allclose(outputs(module), expected, atol=1e-5)
    Model(name="llama", module=module).save(tmp_path / "out")
    assert "quantization_config" not in (tmp_path / "out" / "config.json").read_text()


@pytest.mark.parametrize("mode", ["mha", "mlp", "mix"])
def test_the_perplexities_are_those_of_a_direct_evaluation_and_each_step_takes_the_least(mode):
    data = batches(tiny())
    _, steps = pruned(branches=3, mode=mode, data=data)
    module = tiny()
    named = {str(branch): branch for branch in anatomy_of(module).branches(module)}
    words = {"mha": ["attn"], "mlp": ["mlp"], "mix": ["attn", "mlp"]}[mode]
    gone = []
    for name, perplexity in steps:
        trials = {
            other: math.exp(text_loss(Model(name="", module=silenced(module, [*gone, branch])), data))
            for other, branch in named.items()
            if branch not in gone and branch.kind in words
        }
        assert min(trials, key=lambda other: trials[other]) == name
        assert perplexity == pytest.approx(trials[name], rel=1e-4)
        gone.append(named[name])


def test_the_loss_of_the_text_is_the_mean_over_its_tokens():
    module = tiny()
    data = batches(module)
    losses = []
    for batch in data:
        logits = outputs(module, batch).log_softmax(-1)
        for row, length in enumerate(batch["attention_mask"].sum(1).tolist()):
            losses += [-float(logits[row, place, batch["input_ids"][row, place + 1]]) for place in range(length - 1)]
    assert text_loss(Model(name="", module=module), data) == pytest.approx(sum(losses) / len(losses), rel=1e-5)


def test_one_of_both_kinds_is_no_worse_than_one_of_either():
    first = {mode: pruned(branches=1, mode=mode)[1][0][1] for mode in ("mha", "mlp", "mix")}
    assert first["mix"] == min(first["mha"], first["mlp"])


def test_what_is_left_after_any_step_is_the_result_for_that_many():
    whole = pruned(branches=4)[1]
    assert pruned(branches=2)[1] == whole[:2]


def test_a_case_by_hand():
    # A model whose third MLP and second attention add nothing: both go first, and the perplexity stays what it was.
    module = tiny()
    module.model.layers[2].mlp.down_proj.weight.data.zero_()
    module.model.layers[1].self_attn.o_proj.weight.data.zero_()
    data, expected = batches(module), outputs(module)
    before = math.exp(text_loss(Model(name="", module=module), data))
    model = Model(name="", module=module)
    trials = {}
    for branch in anatomy_of(module).branches(module):
        with without(module, branch):
            trials[str(branch)] = math.exp(text_loss(model, data))
    assert trials["mlp 2"] == trials["attn 1"] == before
    influence = influences(model, anatomy_of(module).branches(module), data)
    none = {str(branch): value for branch, value in influence.items() if branch.depth * 2 + (branch.kind == "mlp") in (2, 5)}
    assert none.keys() == {"attn 1", "mlp 2"}
    assert max(none.values()) < 1e-6 < min(value for branch, value in influence.items() if str(branch) not in none)
    mw.apply(model, BlockPruner(branches=2, candidates=2), data=data)
    assert isinstance(module.model.layers[2].mlp, Removed)
    assert isinstance(module.model.layers[1].self_attn, Removed)
    assert torch.allclose(outputs(module), expected, atol=1e-5)
    assert count(module)[0] == count(tiny())[0] - 3 * 64 * 160 - 2 * 64 * 64 - 2 * 64 * 32 - 2 * 64


def test_influence_is_that_of_the_mlp_on_its_own_input():
    module = tiny()
    data = batches(module)[:1]
    branch = anatomy_of(module).branches(module)[3]
    seen = {}
    block = module.model.layers[1]
    block.post_attention_layernorm.register_forward_pre_hook(lambda _, args: seen.update(before=args[0]))
    block.register_forward_hook(lambda _, args, out: seen.update(after=out))
    outputs(module, data[0])
    kept = data[0]["attention_mask"].bool()
    cosine = torch.nn.functional.cosine_similarity(seen["before"][kept], seen["after"][kept], dim=-1).mean()
    assert influences(Model(name="", module=module), [branch], data)[branch] == pytest.approx(1 - float(cosine), abs=1e-6)


def test_the_last_attention_stays():
    model, steps = pruned(branches=3, mode="mha")
    assert len(steps) == 3
    with pytest.raises(PlanError, match="4 were to go, and after 3 no other can"):
        pruned(branches=4, mode="mha")
    with pytest.raises(PlanError, match="where caches read their length"):
        remove_branches(model.module, anatomy_of(model.module).branches(model.module))


def test_too_few_candidates_and_models_laid_out_otherwise_are_refused():
    with pytest.raises(SettingError, match="3 are to go, and candidates is 2"):
        BlockPruner(branches=3, candidates=2)
    with pytest.raises(SiteError, match=r"the mlp of model\.decoder\.layers\.0 is laid out otherwise"):
        mw.apply(tiny("opt"), BlockPruner(), data=batches(tiny("opt")))
    bert = tiny("bert")
    with pytest.raises(SiteError, match="laid out otherwise"):
        anatomy_of(bert).branches(bert)


def test_a_copy_and_a_later_step_keep_what_was_taken_out(tmp_path):
    model, _ = pruned(branches=2)
    model.save(tmp_path / "out")
    from modelwright.methods.factor.svd import Svd

    streamed = mw.apply(tmp_path / "out", Svd(keep=0.5), save=tmp_path / "svd")
    held = mw.apply(model, Svd(keep=0.5))
    assert torch.equal(outputs(streamed.module), outputs(held.module))


def test_a_text_whose_loss_is_not_finite_removes_nothing():
    module = tiny()
    module.model.layers[1].mlp.down_proj.weight.data *= torch.inf
    keys = module.state_dict().keys()
    with pytest.raises(ModelError, match=r"prune\.blockpruner without .*: the loss of .* on the text is nan"):
        mw.apply(module, BlockPruner(branches=1, mode="mha"), data=batches(tiny()))
    assert module.state_dict().keys() == keys

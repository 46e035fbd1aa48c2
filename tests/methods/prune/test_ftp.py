import copy

import pytest
import torch
from calibration import batches
from tiny import outputs, tiny, tiny_inputs
from torch.nn.functional import binary_cross_entropy_with_logits as binary
from transformers import AutoModelForCausalLM

import modelwright as mw
from modelwright.anatomy.removal import remove_blocks
from modelwright.blocks.token_router import TokenRouter, route_tokens, scores_of
from modelwright.core.errors import DataError, ModelError, PlanError, SettingError, WeightsError
from modelwright.core.gradients import text_loss
from modelwright.core.model import Model
from modelwright.core.routing import distances, mode, observed, shifted
from modelwright.methods.adapt.lora import Lora
from modelwright.methods.prune.ftp import Ftp

BRIEF = {"steps": 3, "population": 2, "generations": 1, "batch": 2}
IDS = torch.tensor([[3, 4, 5, 9, 11]])


def rows(number=8, length=50):
    return [{"input_ids": torch.randint(1, 96, (number, length), generator=torch.Generator().manual_seed(0))}]


def routed(kind="llama", skipped=0.3, bias=0.0, seed=0):
    """A model with routers of random weights, whose mean is shifted."""
    module = tiny(kind)
    routers = route_tokens(module, skipped, 8, "")
    generator = torch.Generator().manual_seed(seed)
    for router in routers:
        for value in router.parameters():
            value.data.copy_(torch.randn(value.shape, generator=generator))
        if router.hidden:
            router.second.bias.data += bias
    return module, routers


def eager(kind="llama"):
    module = tiny(kind)
    module.set_attn_implementation("eager")
    return module


def test_a_case_by_hand():
    # Two heads, whose mean is rows (1), (0.6, 0.4), (0.2, 0.3, 0.5).
    weights = torch.tensor([[[[1.0, 0, 0], [0.8, 0.2, 0], [0.2, 0.2, 0.6]], [[1.0, 0, 0], [0.4, 0.6, 0], [0.2, 0.4, 0.4]]]])
    own, rank, received, place = scores_of(weights)
    assert torch.allclose(own, torch.tensor([[1.0, 0.4, 0.5]]))
    assert torch.allclose(rank, torch.tensor([[0.0, 1 / 2, 0.0]]))  # of token 1's attention, token 0 gets more than itself
    assert torch.allclose(received, torch.tensor([[1.8 / 3, 0.7 / 2, 0.5]]))
    assert place.tolist() == [[0.0, 1.0, 2.0]]
    last = scores_of(weights[:, :, 2:])  # with a cache, the last query alone
    assert torch.equal(last[:2, :, 0], scores_of(weights)[:2, :, 2])
    assert last[3].tolist() == [[2.0]]


def test_the_static_choice_keeps_what_gets_most_attention_and_the_first_and_the_last():
    router = TokenRouter(attention="", hidden=1, skipped=0.5, longest=8)
    received = torch.tensor([[0.0, 0.5, 0.1, 0.4, 0.2, 0.0]])
    first = torch.tensor([[True, False, False, False, False, False]])
    assert router.static(received, first).tolist() == [[True, True, False, False, False, True]]
    router.skipped = 0.0
    assert router.static(received, first).all()


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen3_moe", "gemma2", "gpt_neox"])
def test_routers_that_let_nothing_pass_change_nothing(kind):
    module, _ = routed(kind, bias=1e4)
    assert torch.equal(outputs(module), outputs(eager(kind)))


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2"])
def test_a_block_that_all_tokens_pass_is_a_removed_block(kind):
    module, routers = routed(kind, bias=1e4)
    routers[2].second.bias.data -= 2e4
    removed = eager(kind)
    remove_blocks(removed, [2])
    real = tiny_inputs(module)["attention_mask"].bool()
    assert torch.allclose(outputs(module)[real], outputs(removed)[real], atol=1e-5)


def test_tokens_that_are_computed_come_out_as_in_the_whole_model_where_none_passed_before():
    module, routers = routed(bias=1e4)
    logits = torch.cat(observed(Model(name="", module=module), routers[2], rows(), "logit"))
    routers[2].second.bias.data -= logits.median()
    found, whole = [], []
    other = eager()
    for one, kept in ((module, found), (other, whole)):
        one.model.layers[2].register_forward_hook(lambda _, args, out, kept=kept: kept.extend([args[0], out]))
    ids = rows()[0]["input_ids"]
    with torch.no_grad():
        module(ids)
        other(ids)
    keep = routers[2].seen["keep"].bool()
    assert 0.4 < keep.float().mean() < 0.6
    assert torch.equal(found[1][keep], whole[1][keep])
    assert torch.equal(found[1][~keep], found[0][~keep])


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2"])
def test_generation_with_a_cache_and_without_agree(kind):
    module, routers = routed(kind)
    shifted(Model(name="", module=module), routers, rows())
    settings = {"max_new_tokens": 12, "do_sample": False}
    with torch.no_grad():
        cached, anew = (module.generate(IDS, use_cache=use, **settings) for use in (True, False))
        whole = module(anew).logits
        past, parts = None, []
        for token in anew.split(1, 1):
            out = module(token, past_key_values=past, use_cache=True)
            past = out.past_key_values
            parts.append(out.logits)
    assert torch.equal(cached, anew)
    assert torch.allclose(torch.cat(parts, 1), whole, atol=1e-4)
    assert not torch.allclose(whole, eager(kind)(anew).logits, atol=1e-3)


def test_the_shares_that_pass_are_those_that_were_asked_for():
    module = tiny()
    data = rows()
    model = mw.apply(mw.open(module), Ftp(skipped=0.3, **BRIEF), data=data)
    routers = [block.token_router for block in module.model.layers]
    passed = [1 - float(torch.cat(observed(model, router, data, "keep")).mean()) for router in routers]
    assert passed[0] == routers[0].skipped == 0
    assert passed == pytest.approx([router.skipped for router in routers], abs=0.01)
    assert sum(passed) / 4 == pytest.approx(0.3, abs=0.01)


def test_only_routers_learn_and_they_are_small():
    module = tiny()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    for value in module.model.layers[1].parameters():
        value.requires_grad_(False)
    mw.apply(mw.open(module), Ftp(hidden=16, **BRIEF), data=batches(module))
    after = module.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    more = [name for name in after if name not in before]
    assert sum(after[name].numel() for name in more) == 3 * (6 * 16 + 1)
    assert not any(value.requires_grad for value in module.model.layers[1].self_attn.parameters())
    assert all(value.requires_grad for value in module.model.layers[2].self_attn.parameters())


def test_learning_brings_the_static_choice_and_the_whole_models_predictions_nearer():
    module, routers = routed()
    ids = rows()[0]["input_ids"]
    torch.manual_seed(0)
    first = [part.item() for part in distances(module, routers, ids)]
    optimizer = torch.optim.Adam([value for router in routers for value in router.parameters()], lr=0.02)
    for _ in range(30):
        optimizer.zero_grad()
        sum(distances(module, routers, ids)).backward()
        optimizer.step()
    last = [part.item() for part in distances(module, routers, ids)]
    assert last[0] < 0.8 * first[0]
    assert sum(last) < sum(first)


def test_the_static_choice_is_exact_in_its_share():
    module, routers = routed(skipped=0.3)
    with mode(routers, "static"), torch.no_grad():
        module(rows()[0]["input_ids"])
    assert [1 - float(router.seen["keep"].mean()) for router in routers] == pytest.approx([0, 0.4, 0.4, 0.4])
    assert {router.mode for router in routers} == {"router"}


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen3_moe"])
def test_it_is_saved_and_loads_after_the_import(kind, tmp_path):
    model = mw.apply(mw.open(tiny(kind)), Ftp(skipped=0.3, **BRIEF), data=batches(tiny(kind)))
    found = outputs(model.module)
    assert not torch.allclose(found, outputs(eager(kind)), atol=1e-4)
    assert torch.equal(outputs(copy.deepcopy(model.module)), found)
    model.save(tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert torch.allclose(outputs(again), found, atol=1e-6)
    assert Model(name="", module=again).marks == set()
    assert {name for name in model.module.state_dict() if "token_router" not in name} == set(tiny(kind).state_dict())


def test_without_a_share_the_model_stays_as_it_is():
    module = tiny()
    mw.apply(module, Ftp(skipped=0.0), data=batches(module))
    assert module.state_dict().keys() == tiny().state_dict().keys()
    assert torch.equal(outputs(module), outputs(tiny()))


def test_what_cannot_be_done_is_refused():
    data = batches(tiny())
    with pytest.raises(SettingError, match="skipped must be a number from 0 to 1"):
        Ftp(skipped=1.5)
    with pytest.raises(PlanError, match=r"0\.9 of the tokens are to pass 4 blocks on average, and 3 may let 0\.95 pass at most"):
        mw.apply(tiny(), Ftp(skipped=0.9), data=data)
    with pytest.raises(PlanError, match="bears an adapter"):
        mw.apply(mw.open(tiny()), [Lora(rank=2), Ftp(**BRIEF)], data=data)
    with pytest.raises(DataError, match=r"prune\.ftp learns from tokens that follow others; 1 were given"):
        mw.apply(tiny(), Ftp(**BRIEF), data=[{"input_ids": torch.tensor([[5]])}])
    module, _ = routed()
    with pytest.raises(PlanError, match="routes tokens already"):
        mw.apply(module, Ftp(**BRIEF), data=data)
    module.set_attn_implementation("sdpa")
    with pytest.raises(ModelError, match=r"this model gives none. Call set_attn_implementation\(\"eager\"\)"):
        outputs(module)
    module.set_attn_implementation("eager")
    with pytest.raises(ModelError, match="without the scores of the block before"):
        module.model.layers[1](torch.zeros(1, 3, 64), position_embeddings=module.model.rotary_emb(torch.zeros(1, 3, 64), IDS[:, :3]))


def test_what_a_router_sees_by_hand():
    # Place over the longest, own attention, its rank and the share: (0, 2/8), (1, 0.4), (0, 0.5), 0.25, added up, less 1.2.
    router = TokenRouter(attention="", hidden=4, skipped=0.25, longest=8)
    router.first.weight.data, router.first.bias.data = torch.eye(4), torch.zeros(4)
    router.second.weight.data, router.second.bias.data = torch.ones(1, 4), torch.tensor([-1.2])
    scores = torch.tensor([[[1.0, 0.4]], [[0.0, 0.5]], [[0.6, 0.2]], [[0.0, 2.0]]])
    assert router.keep(scores, None, torch.float32).tolist() == [[1.0, 1.0]]
    assert torch.allclose(router.seen["logit"], torch.tensor([[0.05, 0.2]]))
    assert router.keep(scores, torch.tensor([[4, 0]]), torch.float32).tolist() == [[1.0, 0.0]]
    assert torch.allclose(router.seen["logit"], torch.tensor([[0.55, -0.05]]))


@torch.no_grad()
def test_a_router_sees_the_attention_of_the_last_block_before_it_that_computed_the_token():
    module, routers = routed()
    shifted(Model(name="", module=module), routers, rows())
    weights, ids = [], rows()[0]["input_ids"]
    for block in module.model.layers:
        block.self_attn.register_forward_hook(lambda _, args, out: weights.append(out[1]))
    module(ids)
    known = scores_of(weights[0])
    for depth in (1, 2, 3):
        router = routers[depth]
        own, rank, _, place = known
        inputs = torch.stack([place / router.longest, own, rank, torch.full_like(own, router.skipped)], -1)
        assert torch.allclose(router.seen["logit"], router.second(router.first(inputs).relu()).squeeze(-1), atol=1e-5)
        assert torch.equal(router.seen["static"], router.static(known[2], place == 0))
        keep = router.seen["keep"].bool()
        assert 0 < keep.float().mean() < 1
        known = torch.where(keep, scores_of(weights[depth]), known)


def test_the_first_and_the_last_of_few_tokens_are_computed_whatever_the_share():
    router = TokenRouter(attention="", hidden=1, skipped=0.95, longest=8)
    assert router.static(torch.tensor([[0.3, 0.2]]), torch.tensor([[True, False]])).all()


def test_a_soft_choice_computes_or_passes_and_has_a_gradient():
    module, routers = routed()
    ids, seen = rows()[0]["input_ids"], []
    module.model.layers[1].register_forward_hook(lambda _, args, out: seen.extend([args[0], out]))
    other = eager()
    other.model.layers[1].register_forward_hook(lambda _, args, out: seen.append(out))
    with mode(routers, "soft"):
        module(ids)
    other(ids)
    keep = routers[1].seen["keep"]
    chosen = keep.detach().bool()
    assert 0 < chosen.float().mean() < 1
    assert torch.allclose(seen[1][chosen], seen[2][chosen], atol=1e-5)
    assert torch.allclose(seen[1][~chosen], seen[0][~chosen], atol=1e-5)
    (slope,) = torch.autograd.grad(keep.mean(), routers[1].second.bias)
    assert slope > 0


@pytest.mark.parametrize("bias", [0.0, 1e4])
@torch.no_grad()
def test_the_losses_are_those_of_the_card(bias):
    module, routers = routed(bias=bias)
    ids = rows()[0]["input_ids"]
    whole = eager()(ids).logits.detach()
    torch.manual_seed(1)
    with mode(routers, "soft"):
        found = module(ids).logits
    own = [router for router in routers if router.hidden]
    guide = sum(binary(router.seen["logit"], router.seen["static"].float()) for router in own) / 3
    balance = sum(abs((1 - router.seen["keep"]).mean() - router.skipped) for router in own) / 3
    logits = (whole.softmax(-1) * (whole.log_softmax(-1) - found.log_softmax(-1))).sum(-1).mean()
    torch.manual_seed(1)
    loss, parts = Ftp(guide=2.0, balance=3.0, logits=5.0).loss(module, routers, ids)
    assert [float(part) for part in parts.values()] == pytest.approx([2 * float(guide), 3 * float(balance), 5 * float(logits)], abs=1e-4)
    assert float(loss) == pytest.approx(sum(map(float, parts.values())), rel=1e-5)


def test_the_routers_get_the_best_shares_that_were_tried():
    module, routers = routed()
    model = Model(name="", module=module)
    shares, least = Ftp(skipped=0.3, population=6, generations=2).schedule(model, routers, rows(), torch.Generator().manual_seed(0))
    assert shares == [router.skipped for router in routers]
    assert sum(shares) / 4 == pytest.approx(0.3, abs=1e-5)
    with mode(routers, "static"):
        assert text_loss(model, rows()) == pytest.approx(least, abs=1e-6)


def test_a_model_on_which_it_fails_stays_as_it_was():
    module = tiny()
    module.model.layers[1].mlp.down_proj.weight.data *= torch.inf
    with pytest.raises(ModelError, match=r"prune\.ftp: the loss of .* on the text is nan"):
        mw.apply(module, Ftp(**BRIEF), data=batches(tiny()))
    module = tiny()
    with pytest.raises(WeightsError, match="not finite at step"):
        mw.apply(module, Ftp(**(BRIEF | {"learning_rate": 1e38})), data=batches(tiny()))
    assert module.state_dict().keys() == tiny().state_dict().keys()
    assert torch.allclose(outputs(module), outputs(tiny()), atol=1e-6)

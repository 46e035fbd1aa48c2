"""MoSA: bottlenecks that train in random parts."""

import pytest
import torch
from calibration import TEXT, lettered, normal
from tiny import outputs, tiny

import modelwright as mw
from modelwright.blocks._part import Layer
from modelwright.blocks.bottlenecks import Narrow, Split
from modelwright.core.errors import SiteError
from modelwright.methods.adapt.mosa import Mosa
from modelwright.methods.distill.agree import Agree


def split(experts=4, divide=True, rows=6, columns=5, inner=3, seed=0, **others):
    torch.manual_seed(seed)
    return Split(rows, columns, inner, "relu", experts, divisor=experts if divide else 1, **others)


def parts_of(module):
    return [layer for layer in module.modules() if isinstance(layer, Split)]


def test_a_case_by_hand():
    # U is 2 x 2 of 4 experts with the entries 1, 2, 3, 4 at the places 2, 0, 3, 1: U = (2, 4; 1, 3), of which a quarter is used. With
    # D = identity, φ = relu and x = (2, -1) it gives 0.1 · U/4 (2, 0).
    part = split(rows=2, columns=2, inner=2, scale=0.1).eval()
    part.places.copy_(torch.tensor([2, 0, 3, 1]))
    with torch.no_grad():
        part.down.copy_(torch.eye(2))
        for value, expert in enumerate(part.experts, 1):
            expert.fill_(value)
    assert part.matrix().tolist() == [[0.5, 1], [0.25, 0.75]]
    assert part(torch.tensor([2.0, -1])).tolist() == pytest.approx([0.1, 0.05])
    part.train()
    seen = {tuple(part.matrix().flatten().tolist()) for _ in range(60)}
    assert seen == {(0, 0, 1, 0), (2, 0, 0, 0), (0, 0, 0, 3), (0, 4, 0, 0)}


@pytest.mark.parametrize("experts", [1, 2, 4, 5])
def test_groups_are_disjoint_complete_and_of_one_size(experts):
    part = split(experts)
    groups = part.places.tensor_split(experts)
    assert sorted(place for group in groups for place in group.tolist()) == list(range(18))
    assert max(map(len, groups)) - min(map(len, groups)) <= 1
    assert [len(expert) for expert in part.experts] == [len(group) for group in groups]
    assert sum(value.numel() for value in part.parameters()) == sum(value.numel() for value in Narrow(6, 5, 3, "relu").parameters())


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_attaching_changes_no_output(kind):
    model = mw.apply(lettered(kind), Mosa(inner=8))
    assert torch.equal(outputs(model.module), outputs(tiny(kind)))
    for part in parts_of(model.module):
        part.train()
    assert torch.equal(outputs(model.module), outputs(tiny(kind)))


def test_after_a_step_only_the_entries_of_the_expert_that_was_drawn_have_moved():
    part, inputs, wanted = split(), normal(20, 5), normal(20, 6, seed=1)
    optimizer = torch.optim.AdamW(part.parameters(), lr=0.1, weight_decay=0.5)
    moved = set()
    for step in range(12):
        before = [expert.detach().clone() for expert in part.experts]
        torch.manual_seed(step)
        drawn = int(torch.randint(4, ()))
        torch.manual_seed(step)
        optimizer.zero_grad()
        (part(inputs) - wanted).square().mean().backward()
        optimizer.step()
        now = [number for number, expert in enumerate(part.experts) if not torch.equal(expert, before[number])]
        assert now == [drawn]  # momentum and decay of the others too
        moved.add(drawn)
    assert len(moved) == 4
    assert part.down.grad.abs().sum() > 0  # D is whole and shared


def test_what_is_used_is_what_each_expert_learnt_divided_by_their_number_or_not():
    part, whole = split(), split(divide=False)
    with torch.no_grad():
        for number, (one, two) in enumerate(zip(part.experts, whole.experts, strict=True)):
            one.copy_(normal(len(one), seed=number))
            two.copy_(one)
    own = torch.zeros(18)
    for group, expert in zip(part.places.tensor_split(4), part.experts, strict=True):
        own[group.long()] = expert.detach()
    assert torch.allclose(part.eval().matrix(), own.view(6, 3) / 4)
    assert torch.allclose(whole.eval().matrix(), own.view(6, 3))


def test_layers_draw_each_for_itself():
    module = mw.apply(lettered(), Mosa(inner=8)).module.train()
    with torch.no_grad():
        for part in parts_of(module):
            for number, expert in enumerate(part.experts):
                expert.fill_(number + 1.0)
    drawn = [{int(part.matrix().max()) for part in parts_of(module)} for _ in range(5)]
    assert all(len(one) > 1 for one in drawn)


def test_with_one_expert_it_is_a_plain_bottleneck():
    part, plain = split(1), Narrow(6, 5, 3, "relu")
    with torch.no_grad():
        plain.down.copy_(part.down)
    for module in (part, plain):
        optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
        for step in range(5):
            optimizer.zero_grad()
            (module(normal(20, 5, seed=step)) - normal(20, 6, seed=step + 50)).square().mean().backward()
            optimizer.step()
    assert torch.allclose(part.eval().matrix(), plain.up, atol=1e-6)
    assert torch.allclose(part.down, plain.down, atol=1e-6)


def test_it_learns_with_two_passes_that_agree_and_resting_experts_keep_their_place():
    settings = dict(tokens=48 * 64, batch=4, length=16, learning_rate=1e-2)
    model = mw.apply(lettered(), [Mosa(inner=16, scale=1.0, divide=False), Agree(**settings)], data=TEXT)
    ids = torch.tensor([model.tokenizer(TEXT[0])["input_ids"][:128]])
    mask = torch.ones_like(ids, dtype=torch.bool)
    before, after = (float(Agree(apart=0.0).loss(module, ids, mask)[0].detach()) for module in (tiny(), model.module))
    assert after < 0.9 * before
    assert all(expert.any() for part in parts_of(model.module) for expert in part.experts)
    for part in parts_of(model.module):
        assert torch.equal(part.matrix().flatten()[part.places.long()], torch.cat([expert.detach() for expert in part.experts]))


def test_outputs_have_the_layers_dtype_and_dropout_is_for_training_alone():
    part = Mosa(inner=4, dropout=0.9).part(torch.zeros(6, 5), None)
    with torch.no_grad():
        for expert in part.bottleneck.experts:
            expert.fill_(1.0)
    layer, inputs = Layer.plain(torch.nn.Linear(5, 6).bfloat16()), normal(3, 5).bfloat16()
    assert part(inputs, layer).dtype == torch.bfloat16
    part.eval()
    assert torch.equal(part(inputs, layer), part(inputs, layer))


def test_more_experts_than_entries_are_refused():
    with pytest.raises(SiteError, match="leaves U 64 entries, too few for 65 experts. Give fewer"):
        mw.apply(lettered(), Mosa(inner=1, experts=65, where="mlp.down"))

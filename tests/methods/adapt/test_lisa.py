"""LISA: a few blocks train at a time."""

import dataclasses

import pytest
import torch
from calibration import TEXT, lettered
from tiny import outputs, tiny

import modelwright as mw
from modelwright.core.errors import ModelError
from modelwright.core.training import Training, next_token, train
from modelwright.methods.adapt.lisa import Lisa, Taking
from modelwright.methods.prune.magnitude import Magnitude
from modelwright.methods.train import Train

IDS = torch.randint(0, 90, (600,), generator=torch.Generator().manual_seed(3))
RUN = Training(tokens=12 * 64, batch=4, length=16, learning_rate=1e-2)


def values(module, inside=True):
    """Clones of the parameters in the blocks, by depth, or of all others."""
    found = {}
    for name, value in module.named_parameters():
        depth = int(name.split(".")[2]) if ".layers." in name else None
        if (depth is not None) is inside:
            found.setdefault(depth, {})[name] = value.detach().clone()
    return found


def moved(before, after):
    """The depths at which a parameter changed."""
    return [depth for depth in before if any(not torch.equal(before[depth][name], after[depth][name]) for name in before[depth])]


def tuned(module, method, run=RUN, check=None, **others):
    course = Taking(method, module, run.seed)
    train(module, IDS, run, course=course, report=lambda step, total, parts: check and check(step, course, parts), **others)
    return course


def test_blocks_that_rest_are_the_same_bits_and_all_else_trains():
    module, seen = tiny(), []
    states = [(values(module), values(module, inside=False))]

    def check(step, course, parts):
        states.append((values(module), values(module, inside=False)))
        seen.append(course.drawn((step - 1) // 3))
        assert moved(states[-2][0], states[-1][0]) == seen[-1]
        outside = zip(states[-2][1][None].values(), states[-1][1][None].values(), strict=True)
        assert all(not torch.equal(one, two) for one, two in outside)

    tuned(module, Lisa(blocks=2, every=3), check=check)
    assert [len(blocks) for blocks in seen] == [2] * 12
    assert all(seen[start] == seen[start + 1] == seen[start + 2] for start in range(0, 12, 3))
    assert len({tuple(blocks) for blocks in seen}) > 1
    assert set(states[0][1][None]) == {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}


@pytest.mark.parametrize("blocks", [1, 2, 4])
def test_what_trains_and_what_the_optimizer_holds_is_for_the_drawn_blocks_alone(blocks):
    module, held, trained = tiny(), [], []
    each = sum(value.numel() for value in module.model.layers[0].parameters())
    outside = sum(value.numel() for value in values(module, inside=False)[None].values())

    def check(step, course, parts):
        trained.append(sum(value.numel() for value in module.parameters() if value.requires_grad))
        states = [state for one in course.optimizers for state in one.state.values()]
        held.append(sum(value.nbytes for state in states for name, value in state.items() if name != "step"))

    tuned(module, Lisa(blocks=blocks, every=2), check=check)
    assert set(trained) == {outside + blocks * each}
    assert set(held) == {4 * 2 * (outside + blocks * each)}


def test_a_block_that_is_drawn_again_begins_anew_and_one_that_stays_goes_on():
    module, counts = tiny(), []

    def check(step, course, parts):
        (adam,) = course.optimizers
        found = {number: {int(adam.state[value]["step"]) for value in course.blocks[number]} for number in course.drawn((step - 1) // 2)}
        counts.append(found)

    course = tuned(module, Lisa(blocks=2, every=2), check=check)
    ages, last = dict.fromkeys(range(4), 0), set()
    for step, found in enumerate(counts):
        now = set(course.drawn(step // 2))
        ages = {number: ages[number] + 1 if number in last & now else 1 if number in now else 0 for number in ages}
        assert found == {number: {ages[number]} for number in now}
        last = now
    assert max(max(one) for found in counts for one in found.values()) > 2


def test_all_blocks_at_a_time_is_training_of_everything():
    losses = [[], []]
    modules = [tiny(), tiny()]
    tuned(modules[0], Lisa(blocks=4, every=2), check=lambda step, course, parts: losses[0].append(parts["loss"]))
    train(modules[1], IDS, RUN, report=lambda step, total, parts: losses[1].append(parts["loss"]))
    assert losses[0] == losses[1]
    assert all(torch.equal(one, two) for one, two in zip(modules[0].parameters(), modules[1].parameters(), strict=True))


def test_over_many_turns_each_block_is_drawn_as_often():
    course = Taking(Lisa(blocks=2), tiny(), seed=0)
    drawn = [course.drawn(turn) for turn in range(2000)]
    assert all(len(set(blocks)) == 2 for blocks in drawn)
    counts = [sum(number in blocks for blocks in drawn) for number in range(4)]
    assert all(900 < number < 1100 for number in counts)
    assert drawn[:20] != [Taking(Lisa(blocks=2), tiny(), seed=1).drawn(turn) for turn in range(20)]


@pytest.mark.parametrize("last", [8, 11])
def test_a_run_that_was_killed_ends_with_the_same_bits(last, tmp_path):
    # Checkpoints after 5 and 10 steps, in the middle and at the end of a turn of 5.
    def stop(step, course, parts):
        if step == last:
            raise KeyboardInterrupt

    run, method = dataclasses.replace(RUN, save_every=5), Lisa(blocks=2, every=5)
    whole, broken, again = tiny(), tiny(), tiny()
    tuned(whole, method, run)
    with pytest.raises(KeyboardInterrupt):
        tuned(broken, method, run, check=stop, folder=tmp_path)
    tuned(again, method, run, folder=tmp_path)
    assert all(torch.equal(one, two) for one, two in zip(whole.parameters(), again.parameters(), strict=True))
    assert all(value.requires_grad for value in broken.parameters())


def test_what_was_frozen_before_stays_frozen_and_the_rest_trains_afterwards():
    module = tiny()
    module.model.embed_tokens.weight.requires_grad_(False)
    module.model.layers[1].mlp.up_proj.weight.requires_grad_(False)
    frozen = {name: value.clone() for name, value in module.named_parameters() if not value.requires_grad}
    tuned(module, Lisa(blocks=4))
    assert {name for name, value in module.named_parameters() if not value.requires_grad} == set(frozen)
    assert all(torch.equal(module.get_parameter(name), value) for name, value in frozen.items())


def test_a_head_that_is_the_embedding_trains_with_it():
    module = tiny(tie_word_embeddings=True)
    before = module.lm_head.weight.detach().clone()
    tuned(module, Lisa(blocks=1))
    assert module.lm_head.weight is module.model.embed_tokens.weight
    assert not torch.equal(module.lm_head.weight, before)


def test_zeros_of_a_pruned_model_stay():
    model = mw.apply(lettered(), [Magnitude(sparsity=0.5), Lisa(tokens=512, batch=4, length=16, blocks=4, learning_rate=1e-2)], data=TEXT)
    for block in model.module.model.layers:
        assert int((block.mlp.up_proj.weight == 0).sum()) == 64 * 160 // 2


@pytest.mark.slow
def test_it_learns_nearly_as_much_as_training_of_everything():
    settings = dict(tokens=64 * 64, batch=4, length=16, learning_rate=3e-3)
    models = [mw.apply(lettered(), method, data=TEXT) for method in (Lisa(blocks=2, every=4, **settings), Train(**settings))]
    ids = torch.tensor([lettered().tokenizer(TEXT[0])["input_ids"][:128]])
    mask = torch.ones_like(ids, dtype=torch.bool)
    before, some, all_of_it = (next_token(module, ids, mask)[0].item() for module in (tiny(), *(model.module for model in models)))
    assert before - some > 0.8 * (before - all_of_it) > 0.5
    assert not torch.equal(outputs(models[0].module), outputs(models[1].module))


def test_more_blocks_than_there_are_are_refused():
    with pytest.raises(ModelError, match=r"adapt\.lisa: 5 blocks were to train at a time; the model has 4"):
        mw.apply(lettered(), Lisa(blocks=5, tokens=64, batch=2, length=16), data=TEXT)

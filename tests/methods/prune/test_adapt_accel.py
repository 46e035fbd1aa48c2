import itertools

import pytest
import torch
from calibration import TEXT, lettered
from tiny import outputs, tiny

import modelwright as mw
from modelwright.anatomy import anatomy_of
from modelwright.core.contract import LETTERS
from modelwright.core.errors import PlanError, SettingError, SiteError
from modelwright.core.model import Model
from modelwright.core.passage import similarities_of_blocks
from modelwright.core.training import Order, Training, next_token, train
from modelwright.methods.prune.adapt_accel import AdaptAccel, Rounds
from modelwright.methods.prune.adapt_pruner import due, grown
from modelwright.methods.prune.llm_pruner import LlmPruner

IDS = torch.randint(1, 90, (600,), generator=torch.Generator().manual_seed(0))
RUN = Training(tokens=12 * 64, batch=4, length=16)


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text(TEXT[0])
    return file


def counts(module, kind):
    return [units.count for units in anatomy_of(module).units(module, kind)]


def rounds(module, run=RUN, cls=Rounds, **settings):
    return cls(AdaptAccel(**{"rounds": 4, "share": 0.4} | settings), module, run, [])


def test_times_and_shares_by_hand():
    assert AdaptAccel(share=0.4, rounds=4).updates(8) == pytest.approx({0: 0.1, 2: 0.2, 4: 0.3, 6: 0.4})
    assert AdaptAccel(share=0.6, rounds=3).updates(10) == pytest.approx({0: 0.2, 3: 0.4, 6: 0.6})


def test_sparsities_grow_by_the_step_on_the_mean_and_less_where_a_block_turns_its_input_more():
    # Minus the cosines, less their mean -.7, over the largest: -1, 1, 0.
    gone = {0: 0.3, 1: 0.3, 2: 0.3}
    assert grown(gone, [0.9, 0.5, 0.7], 0.05, 0.02) == pytest.approx({0: 0.37, 1: 0.33, 2: 0.35})
    assert grown(gone, [0.9, 0.5, 0.7], 0.05, 0.0) == pytest.approx({0: 0.35, 1: 0.35, 2: 0.35})
    assert grown({0: 0.98, 1: 0.01}, [0.9, 0.5], 0.05, 0.1) == pytest.approx({0: 0.99, 1: 0.0})  # from 0 to 0.99
    assert due(torch.tensor([3.0, 1.0, 2.0]), 2).tolist() == [torch.inf, 1.0, torch.inf]
    assert due(torch.tensor([3.0, 1.0]), 5).tolist() == [torch.inf] * 2


def test_in_one_round_without_amplitude_it_is_llm_pruner_on_the_first_batch():
    run = Training(tokens=3 * 64, batch=4, length=16, learning_rate=1e-30, weight_decay=0.0)
    ours, theirs = tiny(), tiny()
    course = rounds(ours, run, rounds=1, share=0.25, amplitude=0.0)
    train(ours, IDS, run, course=course)
    batch = Order(len(IDS), run).batch(IDS, 0)
    mw.apply(theirs, LlmPruner(share=0.25, spare_first=0, spare_last=0), data=[{"input_ids": batch}])
    assert (counts(ours, "mlp"), counts(ours, "heads")) == ([120] * 4, [3] * 4)
    assert torch.allclose(outputs(ours), outputs(theirs), atol=1e-6)


def test_blocks_are_compared_by_the_batch_that_trains():
    seen = []

    class Watched(Rounds):
        def gradient(self, step):
            super().gradient(step)
            seen.append(self.similarities and self.similarities.means())

    module = tiny()
    train(module, IDS, RUN, course=rounds(module, cls=Watched))
    first = similarities_of_blocks(Model(name="", module=tiny()), [{"input_ids": Order(len(IDS), RUN).batch(IDS, 0)}])
    assert seen[0] == pytest.approx(first, abs=1e-5)
    assert [step for step, found in enumerate(seen) if found] == [0, 3, 6, 9]
    assert not any(block._forward_hooks for block in module.model.layers)


def test_round_by_round_units_go_and_stay_gone_whatever_the_optimizer_does():
    module, seen = tiny(), []

    class Watched(Rounds):
        def update(self, step):
            super().update(step)
            seen.append([~stays for stays in self.stays])
            for entry, stays in zip(self.found, self.stays, strict=True):
                for span in entry.spans:
                    value = self.module.get_parameter(span.name).detach().movedim(span.dim, 0)
                    part = value[span.start : span.start + entry.count * span.width]
                    assert (part[~stays.repeat_interleave(span.width)] == 0).all()
                    assert (part[stays.repeat_interleave(span.width)] != 0).any()

    run = Training(tokens=12 * 64, batch=4, length=16, learning_rate=0.01, weight_decay=0.5)
    course = rounds(module, run, Watched, amplitude=0.05)
    total = sum(cost * units.count for cost, units in zip(course.costs, course.found, strict=True))
    train(module, IDS, run, course=course)
    for step, entries in enumerate(seen):
        gone = sum(cost * int(one.sum()) for cost, one in zip(course.costs, entries, strict=True)) / total
        due_now = 0.4 * (step // 3 + 1) / 4
        assert due_now - max(course.costs) / total < gone <= due_now + 1e-9  # a head may be more than what is left to go
    assert gone > 0.4 - min(course.costs) / total  # and at last no unit more can go
    assert all((two | ~one).all() for first, second in itertools.pairwise(seen) for one, two in zip(first, second, strict=True))
    stays = {units.scope: int((~one).sum()) for one, units in zip(seen[-1], course.found, strict=True) if units.kind == "mlp"}
    assert counts(module, "mlp") == list(stays.values())


def test_blocks_that_turn_their_input_more_lose_less():
    module = tiny()
    with torch.no_grad():
        for depth, block in enumerate(module.model.layers):
            for layer in (block.mlp.down_proj, block.self_attn.o_proj):
                layer.weight.mul_(3.0 if depth == 2 else 0.2)
    train(module, IDS, RUN, course=rounds(module, amplitude=0.1))
    assert max(counts(module, "mlp")) == counts(module, "mlp")[2] > 130 > max(counts(module, "mlp")[:2])


def test_what_stays_learns_and_the_result_loads(text, tmp_path):
    model = lettered()
    ids = torch.tensor([1 + LETTERS.index(letter) for letter in TEXT[0]]) % 97
    mask = torch.ones(1, 60, dtype=torch.bool)
    before = next_token(model.module, ids[None, :60], mask)[0].item()
    method = AdaptAccel(tokens=30 * 128, batch=4, length=32, rounds=5, share=0.5, learning_rate=0.005)
    mw.apply(model, method, data=text, save=tmp_path / "out")
    assert next_token(model.module, ids[None, :60], mask)[0].item() < 0.7 * before
    assert "loads after `import modelwright`" in model.history[-1]["notes"][-1]
    assert torch.allclose(outputs(mw.open(tmp_path / "out").module), outputs(model.module), atol=1e-5)


def test_a_run_that_was_broken_off_ends_with_the_same_bits(tmp_path):
    settings = Training(tokens=12 * 64, batch=4, length=16, save_every=2)

    def run(module, **others):
        train(module, IDS, settings, course=rounds(module, settings), **others)

    def stop(step, total, parts):
        if step == 5:
            raise KeyboardInterrupt

    whole, broken, fresh = tiny(), tiny(), tiny()
    run(whole)
    with pytest.raises(KeyboardInterrupt):
        run(broken, folder=tmp_path, report=stop)
    run(fresh, folder=tmp_path)
    assert counts(whole, "mlp") == counts(fresh, "mlp")
    assert all(torch.equal(one, other) for one, other in zip(whole.parameters(), fresh.parameters(), strict=True))


def test_what_cannot_be_is_refused_before_anything_changes(text):
    with pytest.raises(SettingError, match="units are some of mlp, heads; got residual"):
        AdaptAccel(units=("residual",))
    model = lettered()
    before = outputs(model.module)
    with pytest.raises(PlanError, match="20 rounds in 8 steps"):
        mw.apply(model, AdaptAccel(tokens=256, batch=2, length=16), data=text)
    with pytest.raises(SiteError, match="all are spared"):
        mw.apply(model, AdaptAccel(tokens=256, batch=2, length=16, rounds=4, spare_first=4), data=text)
    assert torch.equal(outputs(model.module), before)

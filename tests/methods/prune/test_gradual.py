import itertools

import pytest
import torch
from calibration import TEXT, blocks_of, lettered

import modelwright as mw
from modelwright.core.errors import SettingError
from modelwright.core.training import Training, train
from modelwright.methods.prune.gradual import Gradual, Rising, mean_kept

SHORT = {"tokens": 1280, "batch": 4, "length": 16}  # 20 steps


def test_the_ramp_begins_ends_and_is_level_at_the_end():
    ramp = Gradual(sparsity=0.8, begin=0.2, end=0.6, every=10, initial=0.1).updates(1000)
    assert list(ramp) == list(range(200, 601, 10))
    assert ramp[200] == pytest.approx(0.1)
    assert ramp[600] == 0.8
    assert ramp[400] == pytest.approx(0.8 - 0.7 / 8)
    assert list(ramp.values()) == sorted(ramp.values())
    assert ramp[600] - ramp[590] < 1e-4
    assert (ramp[210] - ramp[200]) / 10 == pytest.approx(3 * 0.7 / 400, rel=0.03)


def test_a_run_that_ends_within_its_ramp_reaches_the_sparsity():
    assert Gradual(sparsity=0.5, begin=0.5, end=1.0, every=3).updates(10) == pytest.approx({5: 0.0, 8: 0.5 - 0.5 * 0.4**3, 9: 0.5})
    assert Gradual(sparsity=0.5, begin=1.0, end=1.0).updates(10) == {9: 0.5}
    assert Gradual(sparsity=0.5, begin=0.0, end=0.0).updates(10) == {0: 0.5}


def test_the_mean_number_of_parameters_of_sparse_pretraining():
    # Dense for a quarter of the steps, cubic to three quarters, then fixed: 1 - 0.625 s.
    method = Gradual(sparsity=0.8, begin=0.25, end=0.75, every=1)
    assert mean_kept(method.updates(4000), 4000, 1.0) == pytest.approx(1 - 0.625 * 0.8, abs=1e-3)
    assert mean_kept(method.updates(4000, 0.5), 4000, 0.5) == pytest.approx(1 - 0.625 * 0.4, abs=1e-3)


def test_counted_in_compute_dense_steps_come_sooner_to_their_share():
    steps, method = 4000, Gradual(sparsity=0.8, begin=0.25, end=0.75, every=1, clock="compute")
    ramp = method.updates(steps)
    first, last = min(ramp), max(ramp)
    kept = [1.0] * first + [1 - ramp[step] for step in range(first, last)] + [1 - 0.8] * (steps - last)
    assert sum(kept[:first]) / sum(kept) == pytest.approx(0.25, abs=1e-3)
    assert sum(kept[:last]) / sum(kept) == pytest.approx(0.75, abs=1e-3)
    assert first < 0.25 * steps
    assert last < 0.75 * steps


def test_zeros_are_exact_at_every_update_and_stay():
    model = lettered()
    weight = model.module.model.layers[0].mlp.up_proj.weight
    seen = []

    class Watched(Rising):
        def begin(self, step):
            super().begin(step)
            seen.append((int((weight == 0).sum()), (weight == 0).clone()))

    zeros = Watched([weight], [(weight, 1)], {2: 0.3, 5: 0.6})
    ids = torch.randint(1, 90, (600,), generator=torch.Generator().manual_seed(0))
    train(model.module, ids, Training(tokens=640, batch=4, length=16, weight_decay=0.5, learning_rate=0.01), course=zeros)
    size = weight.numel()
    assert [count for count, _ in seen] == [0, 0] + [int(0.3 * size)] * 3 + [int(0.6 * size)] * 5
    assert all((two | ~one).all() for (_, one), (_, two) in itertools.pairwise(seen))
    assert torch.equal(weight == 0, seen[-1][1])


def test_the_smallest_go():
    weight = torch.nn.Parameter(torch.tensor([[1.0, -4.0, 0.5], [3.0, -2.0, 6.0]]))
    zeros = Rising([weight], [(weight, 1)], {0: 0.5})
    zeros.begin(0)
    assert weight.tolist() == [[0.0, -4.0, 0.0], [3.0, 0.0, 6.0]]
    weight.grad = torch.ones(2, 3)
    zeros.gradient(0)
    assert weight.grad.tolist() == [[0.0, 1.0, 0.0], [1.0, 0.0, 1.0]]


def test_weights_return_where_those_that_stay_become_smaller():
    weight = torch.nn.Parameter(torch.tensor([[1.0, -4.0, 0.5, 3.0]]))
    zeros = Rising([weight], [(weight, 1)], {0: 0.5, 1: 0.5, 2: 0.75}, returning=True)
    zeros.begin(0)
    assert weight.tolist() == [[0.0, -4.0, 0.0, 3.0]]
    weight.data = torch.tensor([[0.0, -4.0, 0.0, 0.7]])  # as an optimizer might leave it
    again = Rising([weight], [(weight, 1)], {1: 0.5, 2: 0.75}, returning=True)
    again.resume(zeros.state())
    again.begin(1)
    assert torch.equal(weight, torch.tensor([[1.0, -4.0, 0.0, 0.0]]))
    weight.grad = torch.ones(1, 4)
    again.gradient(1)
    assert weight.grad.tolist() == [[1.0, 1.0, 0.0, 0.0]]
    again.begin(2)
    assert torch.equal(weight, torch.tensor([[0.0, -4.0, 0.0, 0.0]]))
    monotone = Rising([weight], [(weight, 1)], {0: 0.5}, returning=False)
    assert monotone.state() == {}


def test_a_run_in_which_weights_return_goes_on_with_the_same_bits(tmp_path):
    def trained(folder, steps):
        model = lettered()
        weight = model.module.model.layers[0].mlp.up_proj.weight
        zeros = Rising([weight], [(weight, 1)], {1: 0.5, 5: 0.5, 8: 0.6}, returning=True)
        ids = torch.randint(1, 90, (600,), generator=torch.Generator().manual_seed(0))
        settings = Training(tokens=640, batch=4, length=16, learning_rate=0.05, save_every=3)

        def stop(step, *_):
            if step == steps:
                raise KeyboardInterrupt

        train(model.module, ids, settings, course=zeros, folder=folder, report=stop)
        return weight

    whole = trained(tmp_path / "whole", 0)
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "parts", 7)
    assert torch.equal(trained(tmp_path / "parts", 0), whole)
    assert int((whole == 0).sum()) == int(0.6 * whole.numel())


@pytest.mark.parametrize("sparsity", [0.5, 1.0])
def test_every_matrix_of_the_blocks_ends_with_its_share(sparsity, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(TEXT[0])
    model = lettered()
    mw.apply(model, Gradual(**SHORT, sparsity=sparsity, every=3), data=text)
    for name, weight in blocks_of(model):
        assert int((weight == 0).sum()) == int(sparsity * weight.numel()), name
    assert (model.module.lm_head.weight != 0).all()
    assert "sparse" in model.marks
    assert "the mean over steps of the parameters that are not zero is" in model.history[-1]["notes"][0]


@pytest.mark.parametrize("returning", [False, True])
def test_every_expert_of_a_stack_ends_with_its_share(returning, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(TEXT[0])
    model = lettered("qwen3_moe")
    experts = [block.mlp.experts for block in model.module.model.layers]
    for one in experts:
        one.down_proj.data *= torch.linspace(0.2, 2, 8)[:, None, None]  # all together, the first would lose most
    mw.apply(model, Gradual(**SHORT, sparsity=0.5, every=3, returning=returning), data=text)
    for one in experts:
        for stack in (one.down_proj, one.gate_up_proj):
            assert ((stack == 0).flatten(1).sum(1) == stack[0].numel() // 2).all()


def test_a_run_that_was_broken_off_ends_with_the_same_bits(tmp_path):
    ids = torch.randint(1, 90, (600,), generator=torch.Generator().manual_seed(0))
    settings = Training(tokens=640, batch=4, length=16, save_every=4)
    whole, broken = lettered().module, lettered().module

    def zeros(module):
        weights = [block.mlp.down_proj.weight for block in module.model.layers]
        return Rising(list(module.parameters()), [(weight, 1) for weight in weights], {1: 0.2, 3: 0.4, 6: 0.7})

    train(whole, ids, settings, course=zeros(whole))

    def stop(step, total, parts):
        if step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(broken, ids, settings, course=zeros(broken), folder=tmp_path, report=stop)
    fresh = lettered().module
    train(fresh, ids, settings, course=zeros(fresh), folder=tmp_path)
    assert all(torch.equal(one, other) for one, other in zip(whole.parameters(), fresh.parameters(), strict=True))


def test_what_cannot_be_is_refused():
    with pytest.raises(SettingError, match="begin is after end"):
        Gradual(begin=0.8, end=0.5)
    with pytest.raises(SettingError, match="initial is above sparsity"):
        Gradual(initial=0.8, sparsity=0.5)

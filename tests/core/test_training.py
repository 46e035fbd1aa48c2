import copy
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from modelwright.core.errors import DataError, ModelError, SettingError, WeightsError
from modelwright.core.training import CHECKPOINT, Course, Order, Training, learning_rate, next_token, train

SHORT = Training(tokens=20 * 4 * 8, batch=4, length=8, learning_rate=1e-2, save_every=5)


class KilledError(Exception):
    pass


class Output:
    def __init__(self, logits):
        self.logits = logits


class Small(nn.Module):
    """A causal model with dropout, a tied head, and a buffer that training changes."""

    def __init__(self, seed=0):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.embed = nn.Embedding(32, 16)
            self.norm = nn.LayerNorm(16)
            self.mix = nn.Linear(16, 16)
            self.drop = nn.Dropout(0.1)
            self.head = nn.Linear(16, 32, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, input_ids):
        self.calls += 1
        x = self.embed(input_ids)
        x = x.cumsum(1) / torch.arange(1, x.shape[1] + 1, device=x.device).view(-1, 1)
        return Output(self.head(self.drop(self.mix(self.norm(x)))))


@pytest.fixture
def ids():
    return torch.randint(0, 32, (500,), generator=torch.Generator().manual_seed(3))


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(one, other):
    return all(torch.equal(one[name], other[name]) for name in one)


def kill_after(last):
    def report(step, total, parts):
        if step == last:
            raise KilledError

    return report


@pytest.mark.parametrize("optimizer", ["adamw", "coat", "muon"])
@pytest.mark.parametrize("last", [10, 13])
def test_killed_and_resumed_ends_with_the_same_bits(ids, tmp_path, optimizer, last):
    settings = replace(SHORT, optimizer=optimizer)
    straight = Small()
    train(straight, ids, settings)
    with pytest.raises(KilledError):
        train(Small(), ids, settings, folder=tmp_path, report=kill_after(last))
    resumed, steps = Small(), []
    train(resumed, ids, settings, folder=tmp_path, report=lambda step, total, parts: steps.append(step))
    assert steps == list(range(11, 21))
    assert same(weights(straight), weights(resumed))


def test_same_seed_same_bits_and_another_seed_other_bits(ids):
    models = [Small(), Small(), Small()]
    for model, seed in zip(models, (1, 1, 2), strict=True):
        torch.rand(7)  # the global generator's state has no say
        train(model, ids, replace(SHORT, seed=seed))
    assert same(weights(models[0]), weights(models[1]))
    assert not same(weights(models[0]), weights(models[2]))


def test_training_leaves_the_global_generator_alone(ids):
    before = torch.random.get_rng_state()
    train(Small(), ids, SHORT)
    assert torch.equal(before, torch.random.get_rng_state())


def test_training_lowers_the_loss():
    model, ids = Small().eval(), torch.arange(500) % 7
    mask = torch.ones(1, 500, dtype=torch.bool)
    before = next_token(model, ids[None], mask)[0].item()
    train(model, ids, SHORT)
    assert next_token(model, ids[None], mask)[0].item() < 0.5 * before


@pytest.mark.parametrize("optimizer", ["adamw", "coat", "muon"])
def test_zeros_stay_zero_under_weight_decay_and_others_change(ids, optimizer):
    model = Small()
    with torch.no_grad():
        model.mix.weight[:, ::2] = 0
        model.mix.bias.zero_()
    before = weights(model)
    train(model, ids, replace(SHORT, optimizer=optimizer, weight_decay=0.5), keep_zeros=True)
    assert (model.mix.weight[:, ::2] == 0).all()
    assert (model.mix.weight[:, 1::2] != before["mix.weight"][:, 1::2]).all()
    assert (model.mix.bias != 0).all()  # a vector that starts at zero is no pruned matrix


def test_zeros_stay_zero_through_a_resume(ids, tmp_path):
    def pruned():
        model = Small()
        model.mix.weight.data[:, ::2] = 0
        return model

    with pytest.raises(KilledError):
        train(pruned(), ids, SHORT, keep_zeros=True, folder=tmp_path, report=kill_after(7))
    model = pruned()
    train(model, ids, SHORT, keep_zeros=True, folder=tmp_path)
    assert (model.mix.weight[:, ::2] == 0).all()


class Written(Course):
    """Writes down what happens, and keeps a number between runs."""

    def __init__(self, model):
        self.model, self.seen, self.sum = model, [], torch.zeros(())

    def start(self):
        self.seen.append(("start", self.model.mix.weight.dtype))

    def begin(self, step):
        self.seen.append(("begin", step, self.model.mix.weight.grad is None))

    def gradient(self, step):
        self.sum += float(self.model.mix.weight.grad.norm())
        self.before = self.model.mix.weight.detach().clone()

    def update(self, step):
        self.seen.append(("update", step, not torch.equal(self.before, self.model.mix.weight)))

    def finish(self):
        self.seen.append(("finish", self.model.mix.weight.dtype))

    def leave(self):
        self.seen.append(("leave",))

    def state(self):
        return {"sum": self.sum}

    def resume(self, state):
        self.sum = state["sum"]


def test_a_course_is_called_in_its_order():
    model = Small().bfloat16()
    course, ids = Written(model), torch.arange(500) % 7
    train(model, ids, replace(SHORT, tokens=64, save_every=0), course=course)
    steps = [(name, step, True) for step in (0, 1) for name in ("begin", "update")]
    assert course.seen == [("start", torch.float32), *steps, ("finish", torch.float32), ("leave",)]


def test_a_course_sees_gradients_before_they_are_clipped(ids):
    loose, tight = Small(), Small()
    courses = Written(loose), Written(tight)
    train(loose, ids, replace(SHORT, tokens=32, clip=0), course=courses[0])
    train(tight, ids, replace(SHORT, tokens=32, clip=1e-4), course=courses[1])
    assert courses[0].sum > 1e-3
    assert torch.equal(courses[0].sum, courses[1].sum)


def test_a_course_goes_on_from_a_checkpoint_and_leaves_when_a_run_breaks_off(ids, tmp_path):
    whole = Small()
    straight = Written(whole)
    train(whole, ids, SHORT, course=straight)
    model = Small()
    broken = Written(model)
    with pytest.raises(KilledError):
        train(model, ids, SHORT, course=broken, folder=tmp_path, report=kill_after(13))
    assert broken.seen[-1] == ("leave",)
    assert not any(name == "finish" for name, *_ in broken.seen)
    model = Small()
    resumed = Written(model)
    train(model, ids, SHORT, course=resumed, folder=tmp_path)
    assert torch.equal(resumed.sum, straight.sum)
    model = Small()
    refused = Written(model)
    with pytest.raises(DataError):
        train(model, ids[:4], SHORT, course=refused)
    assert refused.seen == [("leave",)]


def test_accumulation_changes_nothing_but_rounding(ids):
    one, four = Small(), Small()
    one.drop.p = four.drop.p = 0.0
    train(one, ids, SHORT)
    train(four, ids, replace(SHORT, accumulation=4))
    for name, value in one.named_parameters():
        torch.testing.assert_close(value, dict(four.named_parameters())[name], rtol=1e-3, atol=1e-4)


def test_frozen_parameters_and_modes_are_unchanged(ids):
    model = Small().eval()
    model.embed.weight.requires_grad_(False)
    before = weights(model)
    train(model, ids, SHORT)
    assert torch.equal(model.embed.weight, before["embed.weight"])
    assert not torch.equal(model.mix.weight, before["mix.weight"])
    assert not any(module.training for module in model.modules())


def test_weights_come_back_in_their_own_type_and_stay_tied(ids):
    model = Small().bfloat16()
    before = weights(model)
    train(model, ids, SHORT)
    assert {value.dtype for value in model.state_dict().values()} == {torch.bfloat16}
    assert model.head.weight is model.embed.weight
    assert not torch.equal(model.mix.weight, before["mix.weight"])


def test_bfloat16_products_train_float32_weights(ids):
    model, kinds = Small(), set()

    def loss(model, ids, mask):
        kinds.add(model(input_ids=ids).logits.dtype)
        return next_token(model, ids, mask)

    train(model, ids, replace(SHORT, precision="bfloat16"), loss)
    assert kinds == {torch.bfloat16}
    assert model.mix.weight.dtype == torch.float32


def test_only_matrices_decay(ids):
    model = Small()
    before = weights(model)

    def nothing(model, ids, mask):
        return 0 * next_token(model, ids, mask)[0], {}

    train(model, ids, replace(SHORT, weight_decay=0.5), nothing)
    assert (model.mix.weight.abs() < before["mix.weight"].abs()).all()
    assert torch.equal(model.mix.bias, before["mix.bias"])
    assert torch.equal(model.norm.weight, before["norm.weight"])


def test_every_epoch_sees_each_window_once_at_an_offset_of_its_own():
    order = Order(100, replace(SHORT, batch=1, length=8))
    epochs = [[order.starts(epoch * order.windows + step)[0] for step in range(order.windows)] for epoch in range(9)]
    for starts in epochs:
        assert sorted(starts) == list(range(min(starts), min(starts) + 8 * order.windows, 8))
        assert max(starts) + 8 <= 100
    assert len({min(starts) for starts in epochs}) > 1
    assert len({tuple(starts) for starts in epochs}) == 9


def test_the_order_of_a_step_does_not_depend_on_the_steps_before():
    late = Order(100, SHORT).starts(9)
    order = Order(100, SHORT)
    assert [order.starts(step) for step in range(10)][9] == late


def test_a_text_of_exactly_one_window_is_enough_and_one_token_less_is_refused():
    assert Order(8, SHORT).starts(0) == [0, 0, 0, 0]
    with pytest.raises(DataError, match=r"7 tokens.*needs 8"):
        Order(7, SHORT)


def test_the_learning_rate_warms_up_and_ends_at_the_floor():
    settings = Training(tokens=100 * 4 * 8, batch=4, length=8, learning_rate=2.0, warmup=0.1, floor=0.25)
    rates = [learning_rate(step, settings) for step in range(settings.steps)]
    assert rates[:10] == pytest.approx([0.2 * (step + 1) for step in range(10)])
    assert max(rates) == pytest.approx(2.0)
    assert rates[-1] == pytest.approx(0.5)
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_the_learning_rate_may_be_level_until_it_falls():
    settings = Training(tokens=100 * 4 * 8, batch=4, length=8, learning_rate=2.0, warmup=0.1, floor=0.25, decay=0.2)
    rates = [learning_rate(step, settings) for step in range(settings.steps)]
    assert rates[:10] == pytest.approx([0.2 * (step + 1) for step in range(10)])
    assert rates[10:81] == [2.0] * 71
    assert rates[80:] == sorted(rates[80:], reverse=True)
    assert rates[-1] == pytest.approx(0.5)
    middle = 0.25 + 0.75 * 0.5 * (1 + math.cos(math.pi * 10 / 19))
    assert rates[90] == pytest.approx(2 * middle)


def test_a_loss_that_is_not_finite_names_its_step(ids):
    calls = []

    def loss(model, ids, mask):
        calls.append(1)
        value, parts = next_token(model, ids, mask)
        return value * (math.nan if len(calls) == 3 else 1), parts

    with pytest.raises(WeightsError, match=r"step 3 of 20.*[Ll]ower the learning rate"):
        train(Small(), ids, SHORT, loss)


def test_a_broken_checkpoint_is_refused(ids, tmp_path):
    (tmp_path / CHECKPOINT).write_bytes(b"not a checkpoint")
    with pytest.raises(WeightsError, match="cannot be read"):
        train(Small(), ids, SHORT, folder=tmp_path)


def test_a_checkpoint_of_other_settings_is_refused_by_name(ids, tmp_path):
    train(Small(), ids, SHORT, folder=tmp_path)
    with pytest.raises(WeightsError, match="learning_rate"):
        train(Small(), ids, replace(SHORT, learning_rate=1e-3), folder=tmp_path)


def test_a_checkpoint_of_other_text_or_another_model_is_refused(ids, tmp_path):
    train(Small(), ids, SHORT, folder=tmp_path)
    with pytest.raises(WeightsError, match="another data"):
        train(Small(), ids.flip(0), SHORT, folder=tmp_path)
    other = Small()
    other.norm = nn.Identity()
    with pytest.raises(WeightsError, match="another model"):
        train(other, ids, SHORT, folder=tmp_path)


def test_a_refused_checkpoint_leaves_the_model_as_it_was(ids, tmp_path):
    (tmp_path / CHECKPOINT).write_bytes(b"not a checkpoint")
    model = Small().bfloat16().eval()
    before = weights(model)
    with pytest.raises(WeightsError):
        train(model, ids, SHORT, folder=tmp_path)
    assert same(before, weights(model))
    assert model.mix.weight.dtype == torch.bfloat16
    assert not model.training


def test_a_finished_run_is_not_run_again(ids, tmp_path):
    first, again = Small(), Small()
    train(first, ids, SHORT, folder=tmp_path)
    train(again, ids, SHORT, folder=tmp_path, report=kill_after(1))
    assert same(weights(first), weights(again))


def test_a_checkpoint_appears_whole_or_not_at_all(ids, tmp_path):
    train(Small(), ids, SHORT, folder=tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == [CHECKPOINT]


def test_a_model_without_trainable_parameters_is_refused(ids):
    with pytest.raises(ModelError, match="requires a gradient"):
        train(Small().requires_grad_(False), ids, SHORT)


def test_all_wrong_settings_are_named_at_once():
    with pytest.raises(SettingError, match=r"(?s)`warmup` is 2.*`accumulation` is 3.*`optimizer` is sgd"):
        Training(warmup=2, batch=4, accumulation=3, optimizer="sgd")


def test_a_torch_without_muon_is_named(ids, monkeypatch):
    monkeypatch.delattr(torch.optim, "Muon")
    with pytest.raises(SettingError, match="muon needs torch"):
        train(Small(), ids, replace(SHORT, optimizer="muon"))


def test_a_copy_is_trained_without_changing_the_original(ids):
    model = Small()
    before = weights(model)
    train(copy.deepcopy(model), ids, SHORT)
    assert same(before, weights(model))

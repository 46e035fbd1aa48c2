import copy
import math

import pytest
import torch
from calibration import TEXT, lettered
from tiny import tiny, tiny_inputs
from torch import nn

import modelwright as mw
from modelwright.core.errors import ModelError, NeedError, PlanError
from modelwright.core.training import next_token
from modelwright.methods.adapt.lora import Lora
from modelwright.methods.distill.recover import Recover
from modelwright.methods.prune.magnitude import Magnitude

BRIEF = {"tokens": 4096, "batch": 8, "length": 32, "learning_rate": 3e-3}


class Says(nn.Module):
    """A model that gives the same logits whatever it reads, and counts how often it is asked."""

    def __init__(self, logits):
        super().__init__()
        self.given, self.calls = nn.Parameter(torch.as_tensor(logits, dtype=torch.float32)), 0

    def forward(self, input_ids):
        self.calls += 1
        return type("Output", (), {"logits": self.given * 1})()


@pytest.fixture
def pair():
    model, inputs = tiny(seed=0), tiny_inputs(tiny())
    return model, tiny(seed=4), inputs["input_ids"], inputs["attention_mask"].bool()


def distributions(student, teacher, ids, temperature=1.0):
    """log p of the teacher and log q of the student for the token after each, float64."""
    with torch.no_grad():
        return tuple((m(input_ids=ids).logits[:, :-1].double() / temperature).log_softmax(-1) for m in (teacher, student))


def test_a_case_by_hand():
    # One position: the teacher says (1/2, 1/4, 1/4), the student (1/4, 1/4, 1/2).
    # KL(p‖q) = 1/2·ln 2 + 0 - 1/4·ln 2 = ln(2)/4, and so is KL(q‖p). With half the teacher in the mixture,
    # m = (3/8, 1/4, 3/8): 1/2·ln(4/3) + 1/4·ln(2/3).
    p, q = torch.tensor([0.5, 0.25, 0.25]).log(), torch.tensor([0.25, 0.25, 0.5]).log()
    teacher, student = Says(p.expand(1, 2, 3)), Says(q.expand(1, 2, 3))
    ids, mask = torch.tensor([[0, 2]]), torch.ones(1, 2, dtype=torch.bool)
    for settings, expected in (
        ({}, math.log(2) / 4),
        ({"direction": "reverse"}, math.log(2) / 4),
        ({"skew": 0.5}, 0.5 * math.log(4 / 3) + 0.25 * math.log(2 / 3)),
        ({"text": 1.0}, math.log(2)),  # the token after the first is 2, to which the student gives 1/2
        ({"text": 0.25}, 0.75 * math.log(2) / 4 + 0.25 * math.log(2)),
    ):
        assert Recover(**settings).loss(student, ids, mask, teacher)[0].item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 0.7])
def test_without_skew_it_is_the_kl_of_either_direction(pair, temperature):
    student, teacher, ids, mask = pair
    log_p, log_q = distributions(student, teacher, ids, temperature)
    for direction, (log_a, log_b) in {"forward": (log_p, log_q), "reverse": (log_q, log_p)}.items():
        expected = (log_a.exp() * (log_a - log_b)).sum(-1)[mask[:, 1:]].mean().item()
        method = Recover(direction=direction, temperature=temperature)
        assert method.loss(student, ids, mask, teacher)[0].item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("skew", [0.1, 0.5, 0.9])
def test_skew_mixes_the_first_distribution_into_the_second(pair, skew):
    student, teacher, ids, mask = pair
    log_p, log_q = distributions(student, teacher, ids)
    for direction, (log_a, log_b) in {"forward": (log_p, log_q), "reverse": (log_q, log_p)}.items():
        mixture = (skew * log_a.exp() + (1 - skew) * log_b.exp()).log()
        expected = (log_a.exp() * (log_a - mixture)).sum(-1)[mask[:, 1:]].mean().item()
        assert Recover(direction=direction, skew=skew).loss(student, ids, mask, teacher)[0].item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("settings", [{}, {"direction": "reverse"}, {"skew": 0.1}, {"skew": 1.0}, {"temperature": 3.0}])
def test_it_is_zero_where_the_student_is_the_teacher_and_positive_elsewhere(pair, settings):
    student, teacher, ids, mask = pair
    assert Recover(**settings).loss(student, ids, mask, copy.deepcopy(student))[0].item() == pytest.approx(0, abs=1e-6)
    if settings.get("skew") != 1.0:  # compared with itself alone, nothing differs
        assert Recover(**settings).loss(student, ids, mask, teacher)[0].item() > 0.01


def test_masked_tokens_do_not_count(pair):
    student, teacher, ids, mask = pair
    shorter = ids[1:, :7]
    expected = Recover(text=0.5).loss(student, shorter, torch.ones_like(shorter, dtype=torch.bool), teacher)[0]
    assert Recover(text=0.5).loss(student, ids[1:], mask[1:], teacher)[0].item() == pytest.approx(expected.item(), rel=1e-5)


def test_the_text_takes_its_share_and_the_student_runs_once(pair):
    student, teacher, ids, mask = pair
    own = next_token(student, ids, mask)[0].item()
    divergence = Recover().loss(student, ids, mask, teacher)[0].item()
    loss, parts = Recover(text=0.3).loss(student, ids, mask, teacher)
    assert loss.item() == pytest.approx(0.7 * divergence + 0.3 * own, rel=1e-5)
    assert parts["divergence"].item() == pytest.approx(divergence, rel=1e-5)
    assert parts["text"].item() == pytest.approx(own, rel=1e-5)
    once, other = Says(torch.zeros(2, 12, 97)), Says(torch.zeros(2, 12, 97))
    Recover(text=0.3).loss(once, ids, mask, other)
    assert (once.calls, other.calls) == (1, 1)


@pytest.mark.parametrize("settings", [{}, {"direction": "reverse"}, {"skew": 0.1}, {"direction": "reverse", "skew": 0.1}])
def test_gradients_are_finite_where_a_distribution_has_zeros_and_stay_with_the_student(settings):
    wanted = torch.tensor([[[0.0, -math.inf, 1.0], [0.0, 2.0, 1.0]]])
    teacher, student = Says(wanted), Says(torch.tensor([[[1.0, -math.inf, 0.0], [0.0, 1.0, 2.0]]]))
    ids, mask = torch.tensor([[0, 1]]), torch.ones(1, 2, dtype=torch.bool)
    Recover(**settings).loss(student, ids, mask, teacher)[0].backward()
    assert student.given.grad.isfinite().all()
    assert teacher.given.grad is None


@pytest.mark.parametrize("settings", [{}, {"direction": "reverse", "skew": 0.1}, {"text": 0.2}])
def test_a_pruned_model_comes_nearer_to_its_original_keeps_its_zeros_and_leaves_the_teacher(settings):
    model, teacher = lettered(), lettered()
    mw.apply(model, Magnitude(sparsity=0.6))
    zeros = {name: value == 0 for name, value in model.module.named_parameters()}
    inputs = tiny_inputs(model.module, 9)["input_ids"][:1]
    ids, mask = inputs, torch.ones_like(inputs, dtype=torch.bool)
    kept = copy.deepcopy(teacher.module.state_dict())
    before = Recover().loss(model.module, ids, mask, teacher.module)[0].item()
    mw.apply(model, Recover(**BRIEF, **settings), data=TEXT, teacher=teacher)
    after = Recover().loss(model.module, ids, mask, teacher.module)[0].item()
    assert after < 0.9 * before
    for name, value in model.module.named_parameters():
        if "proj" in name:
            assert torch.equal(value == 0, zeros[name]), name
    assert all(torch.equal(value, kept[name]) for name, value in teacher.module.state_dict().items())
    assert all(value.grad is None for value in teacher.module.parameters())


def test_parts_of_a_batch_give_the_gradient_of_the_whole():
    models = [lettered(), lettered()]
    for model, parts in zip(models, (1, 4), strict=True):
        method = Recover(**BRIEF | {"tokens": 512}, accumulation=parts, text=0.3)
        mw.apply(model, method, data=TEXT, teacher=tiny(seed=4))
    for (name, one), other in zip(models[0].module.named_parameters(), models[1].module.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4, msg=name)


def test_adapters_learn_from_the_teacher_on_a_pruned_model():
    model = lettered()
    mw.apply(model, [Magnitude(sparsity=0.5), Lora(rank=4), Recover(**BRIEF)], data=TEXT, teacher=tiny())
    assert all(value.abs().sum() > 0 for name, value in model.module.named_parameters() if "lora_B" in name)


def test_a_teacher_that_does_not_fit_is_refused():
    with pytest.raises(ModelError, match="the teacher's vocabulary has 120 tokens and the model's 97"):
        mw.apply(lettered(), Recover(**BRIEF), data=TEXT, teacher=tiny(vocab_size=120))
    with pytest.raises(NeedError, match=r"distill\.recover needs a teacher"):
        mw.apply(lettered(), Recover(**BRIEF), data=TEXT)
    model = lettered()
    with pytest.raises(PlanError, match="teacher is the model itself"):
        mw.apply(model, Recover(**BRIEF), data=TEXT, teacher=model)

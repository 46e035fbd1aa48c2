import copy

import pytest
import torch
from calibration import TEXT, lettered
from tiny import tiny
from torch import nn
from torch.nn import functional as F

import modelwright as mw
from modelwright.methods.adapt.lora import Lora
from modelwright.methods.distill.agree import Agree
from modelwright.methods.train import Train


class Output:
    def __init__(self, logits):
        self.logits = logits


class Alternating(nn.Module):
    """Gives one of two logits in turn."""

    def __init__(self, *logits):
        super().__init__()
        self.turns = list(logits)

    def forward(self, input_ids):
        self.turns.append(self.turns.pop(0))
        return Output(self.turns[-1])


def test_a_case_by_hand():
    # Over one token that follows another: p = (1/2, 1/2) and q = (3/4, 1/4). The text's token is the first: CE = log 2.
    # KL(p ‖ q) = ½ log(2/3) + ½ log 2 = ½ log(4/3), KL(q ‖ p) = ¾ log(3/2) + ¼ log(1/2).
    p, q = (torch.tensor([[values, values]]).log() for values in ([0.5, 0.5], [0.75, 0.25]))
    ids, mask = torch.zeros(1, 2, dtype=torch.long), torch.ones(1, 2, dtype=torch.bool)
    log = torch.tensor([2.0, 4 / 3, 1.5, 0.5]).log()
    apart = (0.5 * log[1] + 0.75 * log[2] + 0.25 * log[3]) / 2
    for weight in (0.0, 1.0, 3.0):
        found, parts = Agree(apart=weight).loss(Alternating(p, q), ids, mask)
        assert found.item() == pytest.approx((log[0] + weight * apart).item(), rel=1e-5)
        assert parts["apart"].item() == pytest.approx(apart.item(), rel=1e-5)


def test_where_nothing_is_left_to_chance_it_is_plain_training():
    settings = dict(tokens=512, batch=4, length=16, learning_rate=1e-2)
    models = [mw.apply(lettered(), method, data=TEXT) for method in (Agree(**settings), Train(**settings))]
    for one, two in zip(models[0].module.parameters(), models[1].module.parameters(), strict=True):
        assert torch.allclose(one, two, atol=1e-5)


def test_passes_with_dropout_differ_and_both_learn():
    model = mw.apply(lettered(), Lora(rank=4, dropout=0.5))
    with torch.no_grad():
        for name, value in model.module.named_parameters():
            if "lora_B" in name:
                value.fill_(0.1)
    ids = torch.randint(0, 90, (2, 16), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids, dtype=torch.bool)
    module = copy.deepcopy(model.module).train()
    torch.manual_seed(0)
    loss, parts = Agree().loss(module, ids, mask)
    assert parts["apart"] > 0
    torch.manual_seed(0)
    first, second = (torch.log_softmax(module(input_ids=ids).logits[:, :-1].float(), -1) for _ in range(2))
    expected = F.cross_entropy(first.flatten(0, 1), ids[:, 1:].flatten())
    expected = expected + ((first.exp() - second.exp()) * (first - second)).sum(-1).mean() / 2
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    gradients = torch.autograd.grad(loss, [value for value in module.parameters() if value.requires_grad])
    assert all(value.any() for value in gradients)


def test_without_chance_the_passes_are_one():
    module = tiny().eval()
    ids = torch.arange(32).view(2, 16)
    assert Agree().loss(module, ids, torch.ones_like(ids, dtype=torch.bool))[1]["apart"].item() == pytest.approx(0, abs=1e-7)

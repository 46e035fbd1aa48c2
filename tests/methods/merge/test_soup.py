import copy
from types import SimpleNamespace

import pytest
import torch
from tiny import tiny
from torch import nn

import modelwright as mw
from modelwright.core.errors import ModelError, SiteError
from modelwright.core.measure import window_losses
from modelwright.methods.merge._objective import nats
from modelwright.methods.merge.soup import Soup


def loss(module, batches):
    with torch.no_grad():
        found = [window_losses(module, row, len(row)) for batch in batches for row in batch["input_ids"]]
    return float(sum(one.sum() for one, _ in found) / sum(count.sum() for _, count in found))


def trained(seed, batches, steps):
    """A model that knows the calibration tokens, better the more steps."""
    module = tiny(seed=0)
    optimizer = torch.optim.AdamW(module.parameters(), lr=3e-3)
    torch.manual_seed(seed)
    for _ in range(steps):
        batch = batches[0]
        out = module(**batch, labels=batch["input_ids"]).loss
        optimizer.zero_grad()
        out.backward()
        optimizer.step()
    return module.eval()


def moved(module, size, seed):
    """A copy with noise of a size added to every weight; the opposite noise for the opposite size."""
    made, random = copy.deepcopy(module), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in made.parameters():
            value.add_(torch.randn(value.shape, generator=random), alpha=size)
    return made


def mean_of(*modules):
    made = copy.deepcopy(modules[0])
    with torch.no_grad():
        for name, value in made.named_parameters():
            value.copy_(sum(module.get_parameter(name).double() for module in modules) / len(modules))
    return made


def opened(modules):
    return [mw.open(module) for module in modules]


def pots(modules):
    return [dict(module.named_parameters()) for module in modules]


@pytest.fixture(scope="module")
def batches():
    return [{"input_ids": torch.randint(97, (4, 24), generator=torch.Generator().manual_seed(3))}]


@pytest.fixture(scope="module")
def donors(batches):
    return [trained(1, batches, 4), trained(2, batches, 8), moved(tiny(seed=0), 0.5, 9)]


@pytest.fixture(scope="module")
def around(batches):
    """Two models on either side of a good one, and one that is further away, elsewhere; the better of the two comes second."""
    best = trained(1, batches, 30)
    return [moved(best, 0.02, 1), moved(best, -0.018, 1), moved(best, 0.036, 2)]


class Square(nn.Module):
    """The loss is the squared distance of its two weights from the first two numbers of the text, in tenths."""

    def __init__(self, *weights):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(weights))

    def forward(self, input_ids, labels, use_cache):
        return SimpleNamespace(loss=(self.weight - input_ids[0, :2] / 10).square().sum())


SQUARES = [Square(1.0, 0.0), Square(0.0, 1.0)]


def tenths(*numbers):
    return {"input_ids": torch.tensor([numbers])}


def test_uniform_is_the_mean(batches, donors):
    model = mw.apply(tiny(seed=0), Soup(kind="uniform"), donors=donors, data=batches)
    for name, value in model.named_parameters():
        mean = sum(donor.get_parameter(name).double() for donor in donors) / 3
        assert torch.allclose(value.double(), mean, atol=1e-6), name


def test_greedy_takes_donors_by_their_loss_as_long_as_the_mean_is_no_worse(batches, around):
    """The steps one by one: the second alone, with the first, with the first and the third."""
    first, second, third = around
    alone = [loss(one, batches) for one in around]
    assert alone[1] < alone[0] < alone[2]
    both, all_three = loss(mean_of(second, first), batches), loss(mean_of(*around), batches)
    assert both < all_three < alone[1]  # so the third would help the first or the second, but not their mean
    assert Soup().shares(mw.open(tiny(seed=0)), opened(around), batches) == [0.5, 0.5, 0.0]
    assert Soup().shares(mw.open(tiny(seed=0)), opened([third, second]), batches) == [0.0, 1.0]
    model = mw.apply(tiny(seed=0), Soup(), donors=around, data=batches)
    for name, value in model.named_parameters():
        assert torch.allclose(value, mean_of(first, second).get_parameter(name), atol=1e-7), name


def test_greedy_is_no_worse_than_the_best_donor_and_leaves_out_what_hurts(batches, donors):
    model = mw.open(tiny(seed=0))
    mw.apply(model, Soup(), donors=donors, data=batches)
    alone = [loss(donor, batches) for donor in donors]
    assert alone[1] < alone[0] < alone[2]
    assert loss(model.module, batches) <= alone[1] + 1e-6
    shares = Soup().shares(mw.open(tiny(seed=0)), opened(donors), batches)
    assert shares[1] > 0
    assert shares[2] == 0
    (note,) = model.history[-1]["notes"]
    assert [f"{share:.3f}" for share in shares] == [word.rstrip(",;") for word in note.split() if word[1:2] == "."][:3]
    assert f"{loss(model.module, batches):.4f} nats" in note


def test_greedy_of_identical_donors_takes_all_and_is_that_donor(batches, donors):
    assert Soup().shares(mw.open(tiny(seed=0)), opened(donors[:1] * 2), batches) == [0.5, 0.5]  # no worse is enough
    model = mw.apply(tiny(seed=0), Soup(), donors=donors[:1] * 3, data=batches)
    for name, value in model.named_parameters():
        assert torch.allclose(value, donors[0].get_parameter(name), atol=1e-6), name


def test_learned_weights_beat_equal_ones_and_sum_to_one(batches, donors):
    method = Soup(kind="learned", iterations=30, learning_rate=0.3)
    shares = method.learned(tiny(seed=0), pots(donors), batches)
    assert sum(shares) == pytest.approx(1)
    assert shares[2] < shares[0] < shares[1]
    assert shares[2] < 0.02
    learned = mw.apply(tiny(seed=0), method, donors=donors, data=batches)
    equal = mw.apply(tiny(seed=0), Soup(kind="uniform"), donors=donors, data=batches)
    assert loss(learned, batches) < loss(equal, batches)
    for name, value in learned.named_parameters():
        mean = sum(share * donor.get_parameter(name).double() for share, donor in zip(shares, donors, strict=True))
        assert torch.allclose(value.double(), mean, atol=1e-6), name


def test_learned_weights_by_hand():
    # Weights (s, 1 - s) are nearest to (.8, .2) at s = .8. Adam's first step has the length of the learning rate in each
    # logit: after one step s = 1/(1 + exp(-2 · .3)).
    assert Soup(kind="learned", iterations=400).learned(Square(0.0, 0.0), pots(SQUARES), [tenths(8, 2)]) == pytest.approx(
        [0.8, 0.2], abs=1e-3
    )
    once = Soup(kind="learned", iterations=1, learning_rate=0.3).learned(Square(0.0, 0.0), pots(SQUARES), [tenths(8, 2)])
    assert once[0] == pytest.approx(1 / (1 + torch.tensor(-0.6).exp().item()), abs=1e-5)


def test_learned_weights_listen_to_every_batch():
    method = Soup(kind="learned", iterations=400)
    assert method.learned(Square(0.0, 0.0), pots(SQUARES), [tenths(10, 0), tenths(0, 10)]) == pytest.approx([0.5, 0.5], abs=0.05)
    assert method.learned(Square(0.0, 0.0), pots(SQUARES), [tenths(10, 0)])[0] > 0.9


def test_the_loss_is_the_mean_over_all_tokens(batches):
    module, rows = tiny(seed=0), [batches[0]["input_ids"][:2, :9], batches[0]["input_ids"][2:3, :4], torch.tensor([[5]])]
    with torch.no_grad():
        said = [module(input_ids=ids).logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None]).flatten() for ids in rows]
    assert nats(module, [{"input_ids": ids} for ids in rows]) == pytest.approx(-torch.cat(said).mean().item(), rel=1e-5)
    for nothing in ([], [{"input_ids": torch.tensor([[5]])}], [{"pixel_values": torch.zeros(1, 3)}]):
        with pytest.raises(SiteError, match="text of two tokens or more"):
            nats(module, nothing)


def test_the_donors_are_left_and_unlike_ones_refused(batches, donors):
    before = {name: value.clone() for name, value in donors[0].named_parameters()}
    mw.apply(tiny(seed=0), Soup(), donors=donors, data=batches)
    assert all(torch.equal(value, before[name]) for name, value in donors[0].named_parameters())
    with pytest.raises(ModelError, match="other shapes"):
        mw.apply(tiny(), Soup(), donors=[tiny(intermediate_size=96)], data=batches)


def test_pad_tokens_do_not_count_for_learned_weights(batches, donors):
    ids = torch.cat([batches[0]["input_ids"], torch.full((4, 30), 5)], 1)
    padded = [{"input_ids": ids, "attention_mask": (torch.arange(54) < 24).long().expand(4, 54)}]
    pots = [dict(donor.named_parameters()) for donor in donors]
    method = Soup(kind="learned", iterations=10, learning_rate=0.3)
    assert method.learned(tiny(seed=0), pots, padded) == pytest.approx(method.learned(tiny(seed=0), pots, batches), abs=1e-4)

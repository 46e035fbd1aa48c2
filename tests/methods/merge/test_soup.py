import pytest
import torch
from tiny import tiny

import modelwright as mw
from modelwright.core.errors import ModelError
from modelwright.core.measure import window_losses
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


@pytest.fixture(scope="module")
def batches():
    return [{"input_ids": torch.randint(97, (4, 24), generator=torch.Generator().manual_seed(3))}]


@pytest.fixture(scope="module")
def donors(batches):
    noise = tiny(seed=0)
    with torch.no_grad():
        for value in noise.parameters():
            value.add_(torch.randn(value.shape, generator=torch.Generator().manual_seed(9)), alpha=0.5)
    return [trained(1, batches, 4), trained(2, batches, 8), noise]


def test_uniform_is_the_mean(batches, donors):
    model = mw.apply(tiny(seed=0), Soup(kind="uniform"), donors=donors, data=batches)
    for name, value in model.named_parameters():
        mean = sum(donor.get_parameter(name).double() for donor in donors) / 3
        assert torch.allclose(value.double(), mean, atol=1e-6), name


def test_greedy_is_no_worse_than_the_best_donor_and_leaves_out_what_hurts(batches, donors):
    model = mw.apply(tiny(seed=0), Soup(), donors=donors, data=batches)
    assert loss(model, batches) <= min(loss(donor, batches) for donor in donors) + 1e-6
    best = donors[1]
    if all(torch.equal(model.get_parameter(name), value) for name, value in best.named_parameters()):
        assert loss(best, batches) < loss(donors[0], batches)
    assert loss(model, batches) < loss(donors[2], batches) - 0.1


def test_greedy_of_identical_donors_is_that_donor(batches, donors):
    model = mw.apply(tiny(seed=0), Soup(), donors=donors[:1] * 3, data=batches)
    for name, value in model.named_parameters():
        assert torch.allclose(value, donors[0].get_parameter(name), atol=1e-6), name


def test_learned_weights_beat_equal_ones_and_sum_to_one(batches, donors):
    method = Soup(kind="learned", iterations=30, learning_rate=0.3)
    pots = [dict(donor.named_parameters()) for donor in donors]
    shares = method.learned(tiny(seed=0), pots, batches)
    assert sum(shares) == pytest.approx(1)
    assert shares[2] < shares[0] < shares[1] or shares[2] < shares[1]
    learned = mw.apply(tiny(seed=0), method, donors=donors, data=batches)
    equal = mw.apply(tiny(seed=0), Soup(kind="uniform"), donors=donors, data=batches)
    assert loss(learned, batches) < loss(equal, batches)


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

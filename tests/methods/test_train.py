import dataclasses
import math

import pytest
import torch
from calibration import TEXT, lettered
from tiny import tiny, tiny_inputs

import modelwright as mw
from modelwright.core.errors import DataError, NeedError, SettingError
from modelwright.core.given import Given
from modelwright.core.training import cross_entropy
from modelwright.core.walk import change
from modelwright.methods.prune.magnitude import Magnitude
from modelwright.methods.train import Train

BRIEF = {"tokens": 12 * 64, "batch": 4, "length": 16, "learning_rate": 3e-3}  # 12 steps


class KilledError(Exception):
    pass


def given(**others):
    return Given(data=mw.core.data.read(TEXT), **others)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Interrupted(Train):
    """Dies at the start of a step."""

    def loss(self, module, ids, mask):
        self.seen.append(1)
        if len(self.seen) == self.last:
            raise KilledError
        return super().loss(module, ids, mask)


def trained(method, **config):
    model = lettered(**config)
    change(model, method, given())
    return model.module


def test_a_case_by_hand():
    # Logits (0, ln 3) give (1/4, 3/4). After token 0 comes 1, after 1 comes 0: -ln(3/4) and -ln(1/4), mean ln(16/3)/2.
    # The third position has no token after it; where the mask is false, its token does not count.
    logits = torch.tensor([0.0, math.log(3)]).expand(1, 3, 2)
    ids = torch.tensor([[0, 1, 0]])
    mask = torch.ones(1, 3, dtype=torch.bool)
    assert cross_entropy(logits, ids, mask).item() == pytest.approx(math.log(16 / 3) / 2)
    mask[0, 2] = False
    assert cross_entropy(logits, ids, mask).item() == pytest.approx(math.log(4 / 3))


def test_its_loss_is_that_of_transformers():
    model, inputs = tiny(), tiny_inputs(tiny())
    mask = inputs["attention_mask"].bool()
    labels = inputs["input_ids"].masked_fill(~mask, -100)
    expected = model(input_ids=inputs["input_ids"], labels=labels).loss
    assert Train().loss(model, inputs["input_ids"], mask)[0].item() == pytest.approx(expected.item(), rel=1e-6)


def test_one_step_is_that_of_adamw():
    """Without warmup one step has the highest rate: w - η·λ·w for matrices, then the gradient's sign times η."""
    model, before = lettered(), tiny()
    change(model, Train(tokens=64, batch=4, length=16, learning_rate=1e-2, warmup=0, weight_decay=0.5, clip=0), given())
    for name, value in model.module.named_parameters():
        old = before.get_parameter(name)
        step = value - old * (1 - 1e-2 * (0.5 if old.ndim > 1 else 0.0))
        assert step.abs().max() <= 1.001e-2, name
        if "embed" not in name:  # of the table only the rows of letters that occur have a gradient
            assert (step.abs() > 0.9e-2).float().mean() > 0.9, name


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_training_lowers_the_loss_on_its_text(optimizer, precision):
    model = lettered()
    ids = given().ids(model)[None, :64]
    mask = torch.ones_like(ids, dtype=torch.bool)
    before = Train().loss(model.module, ids, mask)[0].item()
    change(model, Train(**BRIEF, optimizer=optimizer, precision=precision), given())
    assert Train().loss(model.module, ids, mask)[0].item() < 0.8 * before


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("last", [4, 6, 10, 12])
def test_a_run_that_was_killed_goes_on_to_the_same_bits(tmp_path, optimizer, last):
    settings = {**BRIEF, "save_every": 3, "optimizer": optimizer}
    straight = trained(Train(**settings))
    killed = Interrupted(**settings)
    object.__setattr__(killed, "seen", [])
    object.__setattr__(killed, "last", last)
    with pytest.raises(KilledError):
        change(lettered(), killed, given(work=tmp_path))
    again = Interrupted(**settings)
    object.__setattr__(again, "seen", [])
    object.__setattr__(again, "last", 0)
    resumed = lettered()
    change(resumed, again, given(work=tmp_path))
    assert len(again.seen) == 12 - (last - 1) // 3 * 3  # the steps since the last checkpoint are done again, no others
    for (name, value), other in zip(resumed.module.named_parameters(), straight.parameters(), strict=True):
        assert torch.equal(value, other), name


@pytest.mark.parametrize("parts", [2, 4])
def test_parts_of_a_batch_give_the_weights_of_the_whole(parts):
    whole, split = trained(Train(**BRIEF)), trained(Train(**BRIEF, accumulation=parts))
    for (name, one), other in zip(whole.named_parameters(), split.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4, msg=name)


def test_gradients_of_the_parts_add_up_to_that_of_the_whole():
    sums = []
    for parts in (1, 4):
        model, found = lettered(), []
        model.module.model.layers[1].mlp.up_proj.weight.register_hook(found.append)
        change(model, Train(tokens=64, batch=4, length=16, accumulation=parts), given())
        assert len(found) == parts
        sums.append(sum(found))
    assert torch.allclose(sums[0], sums[1], rtol=1e-3, atol=1e-6)


def test_frozen_parameters_do_not_move():
    model, before = lettered(), tiny()
    frozen = [name for name, _ in model.module.named_parameters() if "self_attn" in name or "embed" in name]
    for name in frozen:
        model.module.get_parameter(name).requires_grad_(False)
    change(model, Train(**BRIEF), given())
    for name, value in model.module.named_parameters():
        assert torch.equal(value, before.get_parameter(name)) == (name in frozen), name
        assert value.requires_grad == (name not in frozen)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_zeros_of_a_pruned_model_stay_zero(optimizer):
    model = lettered()
    mw.apply(model, [Magnitude(pattern="2:4"), Train(**BRIEF, optimizer=optimizer)], data=TEXT)
    weight = model.module.model.layers[1].mlp.gate_proj.weight
    assert ((weight.view(160, 16, 4) == 0).sum(-1) == 2).all()


def test_tied_weights_stay_tied_and_the_dtype_is_kept():
    model = lettered(tie_word_embeddings=True)
    model.module.to(torch.bfloat16)
    change(model, Train(**BRIEF), given())
    assert model.module.lm_head.weight is model.module.model.embed_tokens.weight
    assert {value.dtype for value in model.module.parameters()} == {torch.bfloat16}


def test_the_same_seed_gives_the_same_bits_and_another_other_ones():
    states = []
    for seed in (1, 1, 2):
        model = lettered()
        change(model, Train(**BRIEF), given(seed=seed))
        states.append(model.module.state_dict())
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    assert any(not torch.equal(value, states[2][name]) for name, value in states[0].items())


def test_what_is_missing_or_wrong_is_refused():
    with pytest.raises(NeedError, match="train needs training text"):
        mw.apply(lettered(), Train(**BRIEF))
    with pytest.raises(DataError, match="needed"):
        mw.apply(lettered(), Train(**BRIEF), data=["too short"])
    with pytest.raises(SettingError, match="`accumulation` is 3; it must be a divisor of `batch`"):
        mw.apply(lettered(), Train(**BRIEF, accumulation=3), data=TEXT)

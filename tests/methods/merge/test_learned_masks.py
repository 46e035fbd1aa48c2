import pytest
import torch
from calibration import TEXT, batches, lettered
from test_fisher import linear, row
from tiny import tiny

import modelwright as mw
from modelwright.core.errors import NeedError, SettingError
from modelwright.core.model import open
from modelwright.methods.merge.learned_masks import LearnedMasks
from modelwright.methods.merge.localize_and_stitch import LocalizeAndStitch


def test_a_case_by_hand():
    # θ0 = (0, 0), θ = (2, 1), x = 1: the donor says class 0, so ∂L/∂W = (q0 - 1, q1) and g ⊙ τ = (2(q0 - 1), q1): less than
    # 0 for the first row, whose score rises, more for the second, whose score falls from +3 below 0.
    model = open(linear(0, 0))
    merged = LearnedMasks(keep=1.0, learning_rate=1e4).model(model, [open(linear(2, 1))], [[row(1.0)]])
    assert merged.module.weight.flatten().tolist() == [2.0, 0.0]
    # θ = (2, -1): both changes speak for class 0, and the second's score rises from -3.
    merged = LearnedMasks(keep=0.5, learning_rate=1e4).model(open(linear(0, 0)), [open(linear(2, -1))], [[row(1.0)]])
    assert merged.module.weight.flatten().tolist() == [2.0, -1.0]


def test_one_step_is_the_one_of_the_formula():
    # q1 = 1/(1 + exp(σ(3)(2 - 1))) = .278, σ' = .0452: S1 = 3 - rate · .0452 · .278 stays above 0 up to a rate of 239.
    for rate, taken in ((230.0, 1.0), (245.0, 0.0)):
        merged = LearnedMasks(keep=1.0, learning_rate=rate).model(open(linear(0, 0)), [open(linear(2, 1))], [[row(1.0)]])
        assert merged.module.weight.flatten().tolist() == [2.0, taken]


def test_the_size_of_the_first_scores_and_the_number_of_steps_are_settings():
    # From scores of 1: q1 = 1/(1 + exp(σ(1)(2 - 1))) = .325, σ'(1) = .1966: 1 - rate · .1966 · .325 is 0 at a rate of 15.65.
    for rate, taken in ((15.0, 1.0), (16.5, 0.0)):
        merged = LearnedMasks(keep=1.0, learning_rate=rate, start=1.0).model(open(linear(0, 0)), [open(linear(2, 1))], [[row(1.0)]])
        assert merged.module.weight.flatten().tolist() == [2.0, taken]
    # At a rate of 130 the first step of scores of 3 ends at S1 = 3 - 130 · .0452 · .278 = 1.37 and S0 above 6; there q1 = .232
    # and σ' = .162, and the second step ends at 1.37 - 130 · .162 · .232 < 0.
    for iterations, taken in ((1, 1.0), (2, 0.0)):
        method = LearnedMasks(keep=1.0, learning_rate=130.0, iterations=iterations)
        merged = method.model(open(linear(0, 0)), [open(linear(2, 1))], [[row(1.0)]])
        assert merged.module.weight.flatten().tolist() == [2.0, taken]


def test_every_donors_mask_is_learned_from_the_model_itself():
    """The second donor's steps start where the first one's did, so the order of the donors does not matter."""
    donors, text = [open(linear(2, 1)), open(linear(-1, 3))], [[row(1.0)], [row(0.5)]]
    method = LearnedMasks(keep=1.0, learning_rate=100.0, iterations=2)
    one = method.model(open(linear(0, 0)), donors, text).module.weight
    other = method.model(open(linear(0, 0)), donors[::-1], text[::-1]).module.weight
    assert torch.equal(one, other)


def test_what_each_entry_costs_lowers_every_score():
    merged = LearnedMasks(keep=0.5, learning_rate=1e4, l1=10.0).model(open(linear(0, 0)), [open(linear(2, -1))], [[row(1.0)]])
    assert merged.module.weight.flatten().tolist() == [0.0, 0.0]


@pytest.mark.parametrize("kind", ["llama", "vit"])
def test_without_steps_it_is_localize_and_stitch(kind):
    donors = [tiny(kind, seed=1), tiny(kind, seed=2)]
    ours = mw.apply(tiny(kind), LearnedMasks(iterations=0), donors=donors, data=batches(donors[0]))
    other = mw.apply(tiny(kind), LocalizeAndStitch(), donors=donors)
    for name, value in other.named_parameters():
        assert torch.equal(ours.get_parameter(name), value), name


def test_every_entry_is_the_models_or_a_donors_or_their_mean():
    base, donors = tiny(), [tiny(seed=1), tiny(seed=2)]
    model = mw.apply(tiny(), LearnedMasks(iterations=2, weights=[1, 3]), donors=donors, data=batches(base))
    for name, value in model.named_parameters():
        zero, one, two = (each.get_parameter(name) for each in (base, *donors))
        near = torch.stack([(value - other).abs() for other in (zero, one, two, (one + 3 * two) / 4)]).amin(0)
        assert near.max() < 1e-6, name
    assert torch.equal(model.model.embed_tokens.weight, base.model.embed_tokens.weight)
    mean = (donors[0].lm_head.weight + 3 * donors[1].lm_head.weight) / 4
    overlap = ((model.lm_head.weight - mean).abs() < 1e-6) & (donors[0].lm_head.weight != base.lm_head.weight)
    assert overlap.any()  # so that the weights of both count somewhere


def test_learning_lowers_the_loss_on_the_donors_text():
    from modelwright.core.training import cross_entropy

    donor = tiny(seed=1)
    data = batches(donor)
    with torch.no_grad():
        for batch in data:  # so that the donor's text is what the donor says
            found = donor(**batch).logits.argmax(-1)
            batch["input_ids"][:, 1:] = torch.where(batch["attention_mask"][:, 1:] > 0, found[:, :-1], 0)

    def loss(model):
        with torch.no_grad():
            return sum(cross_entropy(model(**batch).logits, batch["input_ids"], batch["attention_mask"].bool()).item() for batch in data)

    plain = mw.apply(tiny(), LearnedMasks(iterations=0), donors=[donor], data=data)
    learned = mw.apply(tiny(), LearnedMasks(iterations=1), donors=[donor], data=data)
    assert loss(learned) < loss(plain)


def test_text_is_needed_and_may_be_each_donors_own(tmp_path):
    with pytest.raises(NeedError, match="needs calibration text"):
        mw.apply(tiny(), LearnedMasks(), donors=[tiny(seed=1)])
    (tmp_path / "a.txt").write_text(TEXT[0])
    (tmp_path / "b.txt").write_text("0123456789 " * 80)

    def head(*texts, **given):
        method = LearnedMasks(texts=[str(tmp_path / text) for text in texts] or None)
        return mw.apply(lettered(), method, donors=[lettered(seed=1)], length=16, **given).module.lm_head.weight

    assert torch.equal(head("a.txt"), head(data=TEXT))
    assert not torch.equal(head("a.txt"), head("b.txt"))
    with pytest.raises(SettingError, match="above 0"):
        LearnedMasks(weights=[0.0])

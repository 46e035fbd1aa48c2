import pytest
import torch
from calibration import TEXT, batches, lettered
from tiny import tiny
from torch import nn

import modelwright as mw
from modelwright.core.errors import DataError, ModelError, NeedError, SettingError
from modelwright.core.gradients import squared_gradients
from modelwright.core.model import open
from modelwright.methods.merge.fisher import Fisher

RNG = torch.Generator().manual_seed(0)


def linear(*rows: float) -> nn.Module:
    """One input, a class for each row."""
    layer = nn.Linear(1, len(rows), bias=False)
    layer.weight.data = torch.tensor(rows, dtype=torch.float32)[:, None]
    return layer.eval()


def row(value: float) -> dict[str, torch.Tensor]:
    return {"input": torch.tensor([[value]])}


def test_a_case_by_hand():
    # Equal rows predict (½, ½), so ∂ log q(y)/∂W = (±½) x and F = x²/4: ¼ for x = 1, 9/4 for x = 3.
    # θ = (¼ · 0 + 9/4 · 1) / (¼ + 9/4) = 0.9; with weights 9 and 1 both count alike.
    donors = [open(linear(0, 0)), open(linear(1, 1))]
    data = [[row(1.0)], [row(3.0)]]
    merged = Fisher().model(open(linear(5, 5)), donors, data, RNG)
    assert merged.module.weight.flatten().tolist() == pytest.approx([0.9, 0.9])
    merged = Fisher(weights=[9, 1]).model(open(linear(5, 5)), donors, data, RNG)
    assert merged.module.weight.flatten().tolist() == pytest.approx([0.5, 0.5])


def test_gradients_are_squared_example_by_example():
    # x = 1 and 3: mean of squares (1 + 9)/2 / 4 = 1.25; the square of the batch's mean would be 1.
    for data in ([row(1.0), row(3.0)], [{"input": torch.tensor([[1.0], [3.0]])}]):
        found = squared_gradients(open(linear(0, 0)), data, "predicted", RNG)
        assert found["weight"].flatten().tolist() == pytest.approx([1.25, 1.25])


def test_all_classes_count_by_their_probability():
    # q = (3/4, 1/4), x = 1: row 1 gets 3/4 · (1/4)² + 1/4 · (3/4)² = 3/16; the likely class alone gives (1/4)².
    model = open(linear(torch.tensor(3.0).log().item(), 0))
    assert squared_gradients(model, [row(1.0)], "exact", RNG)["weight"].flatten().tolist() == pytest.approx([3 / 16, 3 / 16])
    assert squared_gradients(model, [row(1.0)], "predicted", RNG)["weight"].flatten().tolist() == pytest.approx([1 / 16, 1 / 16])
    drawn = squared_gradients(model, [row(1.0)] * 2000, "sampled", RNG)["weight"]
    assert drawn.flatten().tolist() == pytest.approx([3 / 16, 3 / 16], rel=0.1)


def test_equal_information_gives_the_weighted_average():
    donors = [open(linear(2, 2)), open(linear(6, 6))]
    merged = Fisher(weights=[3, 1]).model(open(linear(0, 0)), donors, [[row(1.0)]] * 2, RNG)
    assert merged.module.weight.flatten().tolist() == pytest.approx([3.0, 3.0])


def test_where_one_donor_alone_has_information_it_is_copied():
    donors = [open(linear(2, 2)), open(linear(6, 6))]
    merged = Fisher(smallest=0.0).model(open(linear(0, 0)), donors, [[row(0.0)], [row(1e-6)]], RNG)
    assert merged.module.weight.flatten().tolist() == [6.0, 6.0]


def test_where_no_donor_has_information_they_are_averaged():
    donors = [open(linear(2, 2)), open(linear(6, 6))]
    merged = Fisher(smallest=0.0, weights=[3, 1]).model(open(linear(0, 0)), donors, [[row(0.0)]] * 2, RNG)
    assert merged.module.weight.flatten().tolist() == [3.0, 3.0]


@pytest.mark.parametrize("targets", ["predicted", "text"])
def test_padding_does_not_count(targets):
    model = open(tiny())
    ids = torch.tensor([[5, 9, 3]])
    plain = squared_gradients(model, [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}], targets, RNG)
    padded = torch.cat([ids, torch.zeros(1, 4, dtype=torch.long)], 1)
    mask = (torch.arange(7) < 3).long()[None]
    found = squared_gradients(model, [{"input_ids": padded, "attention_mask": mask}], targets, RNG)
    assert all(torch.allclose(found[name], value, rtol=1e-3, atol=1e-5) for name, value in plain.items())


def test_a_tied_matrix_is_one_parameter_with_the_gradient_of_both_uses():
    module = tiny(tie_word_embeddings=True)
    found = squared_gradients(open(module), batches(module, 1), "predicted", RNG)
    assert "lm_head.weight" not in found
    used = batches(module, 1)[0]["input_ids"].unique()
    assert (found["model.embed_tokens.weight"][used].sum(1) > 0).all()


def test_identical_donors_are_returned_and_nothing_given_changes():
    donors = [tiny(seed=3), tiny(seed=3)]
    model = mw.apply(tiny(), Fisher(), donors=donors, data=batches(donors[0]))
    for name, value in model.named_parameters():
        assert torch.allclose(value, donors[0].get_parameter(name), atol=1e-6), name
        assert torch.equal(donors[0].get_parameter(name), tiny(seed=3).get_parameter(name))
        assert donors[0].get_parameter(name).grad is None
    assert all(value.requires_grad for value in donors[0].parameters())


def test_each_donor_has_its_own_text(tmp_path):
    for number, line in enumerate(("the quick brown fox " * 40, "0123456789 " * 80)):
        (tmp_path / f"{number}.txt").write_text(line)
    donors = [lettered(seed=1), lettered(seed=2)]
    texts = [str(tmp_path / "0.txt"), str(tmp_path / "1.txt")]

    def merged(**settings):
        return mw.apply(lettered(), Fisher(**settings), donors=donors, data=TEXT, length=16).module.model.layers[0].mlp.up_proj.weight

    assert not torch.equal(merged(texts=texts), merged(texts=texts[::-1]))
    assert not torch.equal(merged(texts=texts), merged())
    with pytest.raises(SettingError, match="1 texts for 2 donors"):
        merged(texts=texts[:1])


def test_texts_stand_for_the_recipes_data(tmp_path):
    (tmp_path / "a.txt").write_text(TEXT[0])
    donors, texts = [lettered(seed=1), lettered(seed=2)], [str(tmp_path / "a.txt")] * 2
    own = mw.apply(lettered(), Fisher(texts=texts), donors=donors, length=16)
    given = mw.apply(lettered(), Fisher(), donors=donors, data=TEXT, length=16)
    assert all(torch.equal(value, given.module.get_parameter(name)) for name, value in own.module.named_parameters())
    with pytest.raises(NeedError, match="needs calibration text"):
        mw.apply(lettered(), Fisher(), donors=[lettered(seed=1)])


def test_what_cannot_be_done_is_refused():
    module = tiny()
    with pytest.raises(SettingError, match="above 0"):
        Fisher(weights=[1, 0])
    with pytest.raises(ModelError, match="other shapes"):
        mw.apply(module, Fisher(), donors=[tiny(intermediate_size=96)], data=batches(module))
    short = {"input_ids": torch.tensor([[5]]), "attention_mask": torch.tensor([[1]])}
    with pytest.raises(DataError, match="no example"):
        mw.apply(module, Fisher(targets="text"), donors=[tiny()], data=[short])
    with pytest.raises(DataError, match="needs rows of tokens"):
        mw.apply(tiny("mlp"), Fisher(targets="text"), donors=[tiny("mlp")], data=batches(tiny("mlp")))


@pytest.mark.parametrize("targets", ["predicted", "text"])
def test_a_rows_example_is_its_last_token(targets):
    """Its likeliest successor, or itself after those before it."""
    module, ids = tiny(), torch.tensor([[5, 9, 3]])
    log = module(input_ids=ids).logits[0].log_softmax(-1)
    said = log[-1].max() if targets == "predicted" else log[-2, 3]
    names, values = zip(*module.named_parameters(), strict=True)
    expected = dict(zip(names, torch.autograd.grad(said, values, allow_unused=True), strict=True))
    padded = {"input_ids": torch.tensor([[5, 9, 3, 0, 0]]), "attention_mask": torch.tensor([[1, 1, 1, 0, 0]])}
    found = squared_gradients(open(module), [padded], targets, RNG)
    for name in names:
        assert torch.allclose(found[name], expected[name].square(), rtol=1e-3, atol=1e-6), name

import copy
import itertools

import pytest
import torch
from calibration import lettered, normal
from tiny import outputs, tiny
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import modelwright as mw
from modelwright.core.contract import letters
from modelwright.core.errors import ModelError, NeedError
from modelwright.core.model import Model
from modelwright.core.vocabulary import meanings
from modelwright.maths.matching_pursuit import pursue
from modelwright.methods.merge.transplant import Transplant

LETTERS = dict(sorted(letters().get_vocab().items(), key=lambda item: item[1]))  # in the order of the ids


def words(vocabulary: list[str], *, level: bool = False, **special: str) -> PreTrainedTokenizerFast:
    made = Tokenizer(models.WordLevel({word: number for number, word in enumerate(vocabulary)}, unk_token=vocabulary[0]))
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    if level:
        made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token=vocabulary[0], clean_up_tokenization_spaces=False, **special)


def model_of(tokenizer, seed: int = 0, **config) -> Model:
    return Model(name="tiny", module=tiny(seed=seed, vocab_size=len(tokenizer), **config), tokenizer=tokenizer)


# The pursuit


def test_a_case_by_hand():
    # t = (3, 1): the rows (2, 0) and (1, 1) have products 6 and 4. (2, 0) · 1.5 leaves (0, 1); (1, 1) gives the rest with 1,
    # and t = 1 · (2, 0) + 1 · (1, 1).
    atoms = torch.tensor([[0.0, -0.5], [2, 0], [1, 1]])
    places, shares = pursue(torch.tensor([[3.0, 1]]), atoms, 1)
    assert (places.tolist(), shares.tolist()) == ([[1]], [[1.5]])
    places, shares = pursue(torch.tensor([[3.0, 1]]), atoms, 2)
    assert places.tolist() == [[1, 2]]
    assert shares.tolist() == [pytest.approx([1.0, 1.0])]


def test_the_next_row_is_chosen_by_what_is_left():
    # Of t = (3, 1) the row (2, 0) leaves (0, 1), whose products are 0, .1 and .5; with t itself they are 6, 5.8 and .5.
    atoms = torch.tensor([[2.0, 0], [1.9, 0.1], [0, 0.5]])
    places, shares = pursue(torch.tensor([[3.0, 1]]), atoms, 2)
    assert places.tolist() == [[0, 2]]
    assert shares.tolist() == [pytest.approx([1.5, 2.0])]


def test_rows_are_not_brought_to_one_length_and_opposite_ones_are_taken():
    # |row · t| is 3 for (1, 0) and 4 for (-1, -1), though (1, 0) has the smaller angle with t.
    places, shares = pursue(torch.tensor([[3.0, 1]]), torch.tensor([[1.0, 0], [-1, -1]]), 1)
    assert (places.tolist(), shares.tolist()) == ([[1]], [[-2.0]])


def test_more_rows_than_there_are_is_all_of_them():
    places, shares = pursue(normal(3, 6), normal(4, 6, seed=1), 9)
    assert places.shape == shares.shape == (3, 4)
    assert places.sort(1).values.tolist() == [[0, 1, 2, 3]] * 3


def test_rows_that_are_nearly_parallel_are_still_fitted():
    """Atoms within a thousandth of each other: what one step of orthogonalisation leaves would spoil those that follow."""
    atoms = normal(1, 40) + 1e-3 * normal(30, 40, seed=1)
    targets = normal(5, 30, seed=2) @ atoms
    places, shares = pursue(targets, atoms, 30)
    left = (targets - (shares[:, None] @ atoms[places])[:, 0]).norm(dim=1) / targets.norm(dim=1)
    assert left.max() < 1e-5


def test_what_is_left_never_grows_and_the_rows_taken_are_fitted_best():
    targets, atoms = normal(7, 20), normal(50, 20, seed=1)
    lengths = []
    for count in range(1, 26):
        places, shares = pursue(targets, atoms, count)
        left = targets - (shares[:, None] @ atoms[places])[:, 0]
        lengths.append(left.norm(dim=1))
        for row in range(7):
            best = torch.linalg.lstsq(atoms[places[row]].T.double(), targets[row].double()).solution
            fitted = targets[row] - atoms[places[row]].T @ best.float()
            assert left[row].norm() <= fitted.norm() + 1e-4
            assert len(places[row].unique()) == count
    assert all((after <= before + 1e-5).all() for before, after in itertools.pairwise(lengths))
    assert lengths[19].max() < 1e-4  # as many rows as there are entries


def test_rows_that_repeat_each_other_get_no_share_twice():
    atoms = normal(3, 8).repeat(4, 1)
    targets = torch.stack([atoms[0] + 2 * atoms[1] - atoms[2], torch.zeros(8)])
    places, shares = pursue(targets, atoms, 12)
    assert torch.allclose((shares[:, None] @ atoms[places])[:, 0], targets, atol=1e-5)
    assert (shares.abs() > 0).sum(1).tolist() == [3, 0]


# Tokens


def test_tokens_are_compared_by_what_they_stand_for():
    pieces = meanings(words(["<s>", "▁the", "<0x0A>", "<0x41>", "A", "é"]))
    level = meanings(words(["<end>", "Ġthe", "Ċ", "A", "Ã©"], level=True))
    assert {key: (pieces[key], level[key]) for key in pieces if key in level} == {
        b" the": (1, 1), b"\n": (2, 2), b"A": (4, 3), "é".encode(): (5, 4),
    }  # fmt: skip
    assert pieces[b"special <s>"] == level[b"special <end>"] == 0


def test_the_same_tokenizer_changes_nothing():
    model = mw.apply(model_of(letters()), Transplant(), donors=[model_of(letters(), seed=3)])
    before = tiny(vocab_size=len(LETTERS))
    assert all(torch.equal(value, before.get_parameter(name)) for name, value in model.module.named_parameters())


def test_the_same_tokens_in_another_order_move_their_rows():
    turned = words(["<end>", *[token for token in list(LETTERS)[::-1] if token != "<end>"]])
    model = mw.apply(model_of(letters()), Transplant(), donors=[model_of(turned, seed=3)])
    before = tiny(vocab_size=len(LETTERS))
    for token, number in turned.get_vocab().items():
        assert torch.equal(model.module.model.embed_tokens.weight[number], before.model.embed_tokens.weight[LETTERS[token]])
        assert torch.equal(model.module.lm_head.weight[number], before.lm_head.weight[LETTERS[token]])


def test_new_tokens_are_sums_wherever_the_shared_ones_stand():
    """The donor's ids run backwards, with the new token first: its row is a sum by the donor's rows, of the model's."""
    turned = words(["<end>", "the", *[token for token in list(LETTERS)[::-1] if token != "<end>"]])
    donor, old = model_of(turned, 3), tiny(vocab_size=len(LETTERS))
    made = mw.apply(model_of(letters()), Transplant(atoms=4), donors=[donor]).module
    shared = [(number, LETTERS[token]) for token, number in turned.get_vocab().items() if token in LETTERS]
    theirs, own = (torch.tensor(column) for column in zip(*shared, strict=True))
    for name in ("model.embed_tokens", "lm_head"):
        table, rows = donor.module.get_submodule(name).weight.data, old.get_submodule(name).weight.data
        (places,), (shares,) = pursue(table[1:2], table[theirs], 4)
        assert torch.allclose(made.get_submodule(name).weight[1], shares @ rows[own][places], atol=1e-5)


def test_tokens_without_a_row_are_no_tokens():
    """A model's tokenizer may know more tokens than its table has rows: of them nothing is carried over, and nothing made."""
    more = words([*LETTERS, "the", "fox"])
    short = Model(name="short", module=tiny(vocab_size=len(LETTERS)), tokenizer=more)
    made = mw.apply(short, Transplant(fill="mean"), donors=[donor_with(["the"])]).module
    old = tiny(vocab_size=len(LETTERS))
    assert torch.allclose(made.lm_head.weight[-1], old.lm_head.weight.mean(0), atol=1e-6)
    assert torch.equal(made.lm_head.weight[:-1], old.lm_head.weight)
    donor = Model(name="donor", module=tiny(seed=3, vocab_size=len(LETTERS)), tokenizer=more)
    model = mw.apply(model_of(letters()), Transplant(), donors=[donor])
    assert all(torch.equal(value, old.get_parameter(name)) for name, value in model.module.named_parameters())


def donor_with(new: list[str], seed: int = 3, **config) -> Model:
    return model_of(words([*LETTERS, *new]), seed, **config)


@pytest.mark.parametrize("settings", [{"atoms": len(LETTERS)}, {}], ids=str)  # by itself 64, as many as a row has entries
def test_with_as_many_atoms_as_entries_a_donor_of_the_same_rows_is_reproduced(settings):
    donor = donor_with(["the", "fox"])
    base = model_of(letters())
    with torch.no_grad():
        for name in ("model.embed_tokens", "lm_head"):
            base.module.get_submodule(name).weight.copy_(donor.module.get_submodule(name).weight[: len(LETTERS)])
    mw.apply(base, Transplant(**settings), donors=[donor])
    for name in ("model.embed_tokens", "lm_head"):
        assert torch.allclose(base.module.get_submodule(name).weight, donor.module.get_submodule(name).weight, atol=1e-4)


@pytest.mark.parametrize("tied", [(False, False), (True, False), (False, True), (True, True)])
def test_new_tokens_are_the_same_sums_of_the_models_rows(tied):
    donor = donor_with(["the"], hidden_size=32, num_attention_heads=4, tie_word_embeddings=tied[1])
    model = model_of(letters(), tie_word_embeddings=tied[0])
    old = copy.deepcopy(model.module)
    mw.apply(model, Transplant(atoms=5), donors=[donor])
    for own, theirs in (("model.embed_tokens", "model.embed_tokens"), ("lm_head", "lm_head")):
        source = "model.embed_tokens" if tied[0] else theirs  # one table, from the donor's embedding
        table = donor.module.get_submodule(source).weight.data
        places, shares = pursue(table[-1:], table[:-1], 5)
        expected = shares[0] @ old.get_submodule(own).weight.data[places[0]]
        assert torch.allclose(model.module.get_submodule(own).weight[-1], expected, atol=1e-5)
        assert torch.equal(model.module.get_submodule(own).weight[:-1], old.get_submodule(own).weight)
    assert (model.module.lm_head.weight is model.module.model.embed_tokens.weight) == tied[0]


def test_other_ways_to_fill_and_rows_that_no_token_has():
    donor = Model(name="donor", module=tiny(seed=3, vocab_size=99), tokenizer=words([*LETTERS, "the"]))
    old = tiny(vocab_size=len(LETTERS)).model.embed_tokens.weight
    for fill, expected in (("mean", old.mean(0)), ("zero", torch.zeros(64))):
        model = mw.apply(model_of(letters()), Transplant(fill=fill), donors=[donor]).module.model.embed_tokens.weight
        assert torch.allclose(model[95], expected, atol=1e-6)
        assert (model[96:] == 0).all()
        assert len(model) == 99
    drawn = [mw.apply(model_of(letters()), Transplant(fill="random"), donors=[donor], seed=seed) for seed in (1, 1, 2)]
    rows = [model.module.model.embed_tokens.weight[95] for model in drawn]
    assert torch.equal(rows[0], rows[1])
    assert not torch.equal(rows[0], rows[2])
    # 400 new tokens have the mean and the spread of each column of the shared rows.
    shifted = model_of(letters())
    with torch.no_grad():
        shifted.module.lm_head.weight.mul_(torch.linspace(0.1, 2, 64)).add_(torch.linspace(-3, 3, 64))
    kept = shifted.module.lm_head.weight.data.clone()
    found = mw.apply(shifted, Transplant(fill="random"), donors=[donor_with([f"new{i}" for i in range(400)])]).module.lm_head.weight[95:]
    spread = kept.std(0, correction=0)
    assert ((found.mean(0) - kept.mean(0)).abs() < 5 * spread / 400**0.5).all()
    assert ((found.std(0) / spread - 1).abs() < 5 / 800**0.5).all()


def test_plain_transformers_loads_it_with_the_donors_tokenizer_and_ids(tmp_path):
    tokenizer = words(["<pad>", "<begin>", *LETTERS, "the"], bos_token="<begin>", pad_token="<pad>")
    donor = model_of(tokenizer, 3, bos_token_id=1, pad_token_id=0, eos_token_id=2)
    donor.save(tmp_path / "donor")
    lettered().save(tmp_path / "base")
    model = mw.apply(tmp_path / "base", Transplant(), donors=[tmp_path / "donor"], save=tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert torch.equal(outputs(loaded), outputs(model.module))
    config = loaded.config
    assert (config.vocab_size, config.bos_token_id, config.eos_token_id, config.pad_token_id) == (len(tokenizer), 1, 2, 0)
    assert AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab() == tokenizer.get_vocab()


@pytest.mark.parametrize("pad", [0, 3, None, 400])
def test_the_row_of_padding_is_the_donors(pad):
    donor = donor_with(["the"], pad_token_id=None)
    donor.module.config.pad_token_id = pad
    model = mw.apply(model_of(letters()), Transplant(), donors=[donor])
    assert model.module.get_input_embeddings().padding_idx == (None if pad == 400 else pad)  # it has no row 400


def test_a_bias_of_the_head_moves_with_its_tokens():
    turned = words(["<end>", *[token for token in list(LETTERS)[::-1] if token != "<end>"]])
    model = Model(name="phi", module=tiny("phi", vocab_size=len(LETTERS)), tokenizer=letters())
    before = model.module.lm_head.bias.clone()
    mw.apply(model, Transplant(), donors=[model_of(turned)])
    order = [LETTERS[token] for token, _ in sorted(turned.get_vocab().items(), key=lambda item: item[1])]
    assert torch.equal(model.module.lm_head.bias, before[order])


def test_what_cannot_be_compared_is_refused():
    with pytest.raises(NeedError, match="compares tokenizers"):
        mw.apply(lettered(), Transplant(), donors=[tiny()])
    with pytest.raises(NeedError, match="takes 1 donor; the step gives 2"):
        mw.apply(lettered(), Transplant(), donors=[lettered(), lettered()])
    with pytest.raises(ModelError, match="share no token"):
        mw.apply(lettered(), Transplant(), donors=[model_of(words(["<s>", "alpha", "beta"]))])
    vit = Model(name="vit", module=tiny("vit"), tokenizer=letters())
    with pytest.raises(ModelError, match="no embedding of tokens"):
        mw.apply(vit, Transplant(), donors=[lettered()])

"""What quantising costs: scores by likelihood that can be worked out by hand, files that are refused, and a whole comparison."""

from __future__ import annotations

import json
import math
import types

import pytest
import torch
from standin import documents
from tiny import tiny
from torch import nn
from typer.testing import CliRunner

import modelwright as mw
from modelwright import report
from modelwright.cli import app
from modelwright.core import data, evaluate
from modelwright.core.contract import letters
from modelwright.core.errors import DataError, SettingError
from modelwright.core.model import Model
from modelwright.methods.quantize.rtn import Rtn


class After(nn.Module):
    """The chance of a token depends on the one before it alone: log-probabilities [97, 97]."""

    def __init__(self, logs: torch.Tensor):
        super().__init__()
        self.logs = nn.Parameter(logs)
        self.config = types.SimpleNamespace(vocab_size=97, model_type="none", max_position_embeddings=8)

    def forward(self, input_ids, use_cache=False):
        return types.SimpleNamespace(logits=self.logs[input_ids])


def letter(text: str) -> int:
    (found,) = letters()(text, add_special_tokens=False)["input_ids"]
    return found


@pytest.fixture
def model() -> Model:
    """After an a there is b in half of all cases, c in a quarter; all else is even."""
    chances = torch.full((97, 97), 1 / 97)
    chances[letter("a")] = 0.25 / 95
    chances[letter("a"), letter("b")], chances[letter("a"), letter("c")] = 0.5, 0.25
    return Model(name="after", module=After(chances.log()), tokenizer=letters())


def test_likelihoods_by_hand(model):
    assert evaluate.likelihood(model, "xa", "b") == pytest.approx(math.log(0.5))
    assert evaluate.likelihood(model, "xa", "cx") == pytest.approx(math.log(0.25 / 97), rel=1e-5)
    assert evaluate.likelihood(model, "", "aba") == pytest.approx(math.log(0.5 / 97), rel=1e-5)  # nothing predicts the first token
    assert evaluate.likelihood(model, "x" * 50, "ab") == pytest.approx(-math.log(97) + math.log(0.5), rel=1e-5)
    assert evaluate.likelihood(model, "x", "y" * 50) == pytest.approx(-7 * math.log(97), rel=1e-5)  # it takes 8 tokens
    with pytest.raises(DataError, match="'a' is too few tokens for after to predict any"):
        evaluate.likelihood(model, "", "a")


def test_scores_by_hand(model):
    asked = [{"question": "a", "choices": ["c", "b"], "answer": 1},
             {"question": "a", "choices": ["c", "b"], "answer": 0},
             {"question": "xa", "choices": ["cc", "b", "x"], "answer": 1},
             {"question": "a", "choices": ["x", "c"], "answer": 1}]  # fmt: skip
    assert evaluate.right(model, asked) == 0.75
    # Not divided, a long choice would lose: log(1 / 4 / 97) is -6.0 and log(1 / 4 / 95) -5.9; by byte it is half of that.
    assert evaluate.right(model, [{"question": "a", "choices": ["x", "cx"], "answer": 1}]) == 1
    pairs = [{"stereotype": "ab", "other": "ac"}, {"stereotype": "ac", "other": "ab"}, {"stereotype": "xy", "other": "yx"}]
    assert evaluate.preferring(model, pairs) == pytest.approx(0.5)
    assert evaluate.preferring(model, pairs[:1]) == 1


def test_distances_by_hand(model):
    other = After(torch.full((97, 97), -math.log(97)))
    with torch.no_grad():
        other.logs[letter("b"), letter("d")] = 5.0
    ids = torch.tensor(list(map(letter, "abxaybacz")))
    one, two = (module.logs.detach()[ids[:-1]].double().log_softmax(-1) for module in (model.module, other))
    found = evaluate.apart(model.module, other, ids, 4)
    assert found["divergence"] == pytest.approx(float((one.exp() * (one - two)).sum(-1).mean()), rel=1e-4)
    assert found["flips"] == pytest.approx(float((one.argmax(-1) != two.argmax(-1)).float().mean()))
    assert found["flips"] == 5 / 8  # after the three a and the two b
    assert evaluate.apart(model.module, model.module, ids, 4) == {"divergence": 0.0, "flips": 0.0}


def test_models_of_other_vocabularies_are_not_compared():
    other = Model(name="other", module=tiny("llama", vocab_size=50), tokenizer=letters())
    with pytest.raises(SettingError, match="other has 50 tokens and its original 97"):
        evaluate.compared(Model(name="one", module=tiny("llama"), tokenizer=letters()), other, data.read(["abc " * 200]))


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", r"line 2 is not JSON"),
        ("[1]", r"line 2 is no JSON object"),
        ('{"question": "a", "choices": ["b"], "answer": 0}', r"line 2 needs a question and two or more choices"),
        ('{"question": "a", "choices": ["b", 1], "answer": 0}', r"line 2 needs a question and two or more choices"),
        ('{"question": "a", "choices": ["b", "c"], "answer": 2}', r"needs the number of the right choice as answer, from 0 to 1; got 2"),
        ('{"question": "a", "choices": ["b", "c"], "answer": true}', r"got True"),
    ],
)
def test_lines_that_are_no_questions_are_named(line, said, tmp_path):
    file = tmp_path / "questions.jsonl"
    file.write_text('{"question": "a", "choices": ["b", "c"], "answer": 0}\n' + line + "\n", "utf-8")
    with pytest.raises(DataError, match=said):
        evaluate.questions(file)


def test_what_is_missing_is_said_before_a_model_is_read(tmp_path):
    (tmp_path / "pairs.jsonl").write_text('{"stereotype": "a"}\n', "utf-8")
    with pytest.raises(DataError, match=r"line 1 needs the texts stereotype and other"):
        mw.measure("nowhere", "nowhere", preset="quantization", pairs=tmp_path / "pairs.jsonl")
    with pytest.raises(DataError, match=r"none.jsonl cannot be read"):
        mw.measure("nowhere", "nowhere", preset="quantization", questions=tmp_path / "none.jsonl")
    with pytest.raises(SettingError, match=r"There is no preset 'quantisation'.*quantization"):
        mw.measure("nowhere", "nowhere", preset="quantisation")
    with pytest.raises(SettingError, match=r"name it first, then them. Got 1 in all"):
        mw.measure("nowhere", preset="quantization")
    with pytest.raises(SettingError, match=r"belong to a preset"):
        mw.measure("nowhere", questions=tmp_path / "none.jsonl")


@pytest.fixture(scope="module")
def compared(stand_in, tmp_path_factory):
    """The command on the stand-in and two quantised forms of it: the folder with its files, and the rows."""
    folder = tmp_path_factory.mktemp("compared")
    for bits in (8, 2):
        mw.apply(str(stand_in), Rtn(bits=bits, group=32), save=folder / f"of-{bits}")
    asked = [{"question": "for a", "choices": [" statement", " zq#zq#"], "answer": 0},
             {"question": "the", "choices": [" ~", " a"], "answer": 1}]  # fmt: skip
    pairs = [{"stereotype": f"the {word} is here", "other": f"a {word} was there"} for word in ("class", "value", "list")]
    for name, rows in (("asked", asked), ("truths", asked[:1]), ("pairs", pairs)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    files = [part for key, name in (("questions", "asked"), ("truths", "truths"), ("pairs", "pairs"))
             for part in (f"--{key}", str(folder / f"{name}.jsonl"))]  # fmt: skip
    models = [str(stand_in), str(folder / "of-8"), str(folder / "of-2")]
    (folder / "text.txt").write_text("\n\n".join(documents()[1]), "utf-8")
    asked_for = ["--preset", "quantization", *files, "--data", str(folder / "text.txt"), "--tokens", "600"]
    shown = ["--page", str(folder / "page.html"), "--json", "--quiet"]
    done = CliRunner().invoke(app, ["measure", *models, *asked_for, *shown], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return folder, json.loads(done.stdout)


def test_each_model_is_compared_with_the_first_in_three_groups(compared):
    _, rows = compared
    original, eight, two = rows
    assert (original["divergence"], original["flips"]) == (0.0, 0.0)
    assert 0 < eight["divergence"] < two["divergence"]
    assert eight["flips"] <= two["flips"] > 0
    assert original["bytes_disk"] > eight["bytes_disk"] > two["bytes_disk"]
    for row in rows:
        assert {column for columns in evaluate.GROUPS.values() for column in columns} <= set(row)
        assert row["questions_right"] in (0, 0.5, 1)
        assert row["truths_right"] in (0, 1)
        assert row["peak_memory"] > 0 < row["decode_tokens_per_second"]


def test_the_page_has_the_three_groups_as_one_table(compared):
    folder, rows = compared
    page = (folder / "page.html").read_text("utf-8")
    assert page.count("<table>") == 1
    places = [page.index(f">{group}</th>") for group in ("knowledge and capacity", "alignment", "efficiency")]
    assert places == sorted(places)
    assert places[1] < page.index("nats from the original") < places[2] < page.index("decode tokens/s")
    assert report.shown("divergence", rows[2]) in page
    assert "src=" not in page
    few = report.grouped_html([{"model": "one", "divergence": 0.5}])
    assert "alignment" in few
    assert "efficiency" not in few

"""Adapters side by side: equal budgets, rates chosen on training data, runs that go on, and tables that say what was found."""

import json
import sys

import pytest
import torch
from tiny import tiny
from torch import nn

import modelwright as mw
from modelwright import cli, compare, small
from modelwright.core import find, labels
from modelwright.core.contract import LETTERS, letters
from modelwright.core.errors import ModelwrightError, RecipeError, SettingError
from modelwright.core.method import AdapterMethod
from modelwright.core.model import Model

SIZED = [name for name in find.names() if issubclass(cls := find.find(name), AdapterMethod) and cls.sized_by]
QUICK = ("lora", "compacter", "spiel")  # sizes that rise, fall, and are shares
ASKED = {"parameters": "4%", "tokens": 400, "batch": 2, "length": 32, "rates": [0.01, 0.02], "seeds": [0, 1]}


@pytest.fixture
def folder(tmp_path):
    Model(name="llama", module=tiny("llama", vocab_size=len(letters())), tokenizer=letters()).save(tmp_path / "llama")
    (tmp_path / "my.txt").write_text("\n\n".join(f"{word} {LETTERS} {word[::-1]}" for word in map(str, range(10_000, 10_400))))
    return tmp_path


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    """A ViT that has seen a few stripes."""
    path = tmp_path_factory.mktemp("vit")
    small.vit(20).save_pretrained(path)
    return path


def text_task(folder, **more):
    return compare.task_of("mine", compare.read(stated(folder, ["adapt.lora"], **more)), folder)


def stated(folder, methods, **more):
    return {"compare": methods, "tasks": {"mine": {"model": str(folder / "llama"), "data": str(folder / "my.txt")}},
            "save": str(folder / "out"), **ASKED, **more}  # fmt: skip


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name.removeprefix("adapt.") in QUICK else pytest.mark.slow) for name in SIZED]
)
def test_the_size_is_the_largest_within_the_budget(name, folder):
    task = text_task(folder, parameters=6000)
    method = find.find(name)(**{key: value for key, value in find.find(name).small.items() if key not in find.find(name).sized_by})
    sizes = {size: count for size in range(1, 65) if (count := counted(task, method, size)) is not None and count <= 6000}
    if not sizes and name != "adapt.apet":  # whose size is the number itself
        with pytest.raises(SettingError, match="6,000 are allowed"):
            task.within(method)
        return
    found = task.within(method)
    trained = task.counted(found)
    assert trained <= 6000
    assert trained >= 0.97 * max(sizes.values(), default=0), f"{found} trains {trained}, and some size {max(sizes.values())}"


def counted(task, method, size):
    try:
        return task.counted(type(method)(**{**method.settings(), **type(method).sized(size)}))
    except ModelwrightError:
        return None


def test_a_comparison_of_texts_from_the_command_line_goes_on_and_says_all(folder, capsys, monkeypatch):
    asked = stated(folder, ["adapt.lora", {"adapt.parallel": {"activation": "relu"}}, "adapt.series", {"adapt.ssf": {}}], parameters=4550)
    (folder / "my.yaml").write_text(json.dumps(asked))
    monkeypatch.setattr(sys, "argv", ["modelwright", "run", str(folder / "my.yaml"), "--set", "tokens=320"])
    with monkeypatch.context() as dry:
        dry.setattr(sys, "argv", [*sys.argv, "--dry-run"])
        with pytest.raises(SystemExit):
            cli.main()
    assert "4 adapters on 1 tasks: at most 24 runs of 320 tokens" in capsys.readouterr().out
    assert not (folder / "out.steps").exists()
    whole, done = compare.Task.run, []

    def some(*own):
        if len(done) > 9:
            raise KeyboardInterrupt
        done.append(own)
        return whole(*own)

    monkeypatch.setattr(compare.Task, "run", some)
    with pytest.raises(KeyboardInterrupt):
        compare.compare({**asked, "tokens": 320})
    left = {file.name for file in (folder / "out.steps").iterdir()}
    assert len(left) == 10
    again = []
    monkeypatch.setattr(compare.Task, "run", lambda *own: again.append(own) or whole(*own))
    monkeypatch.setattr(cli.out, "width", 200)
    with pytest.raises(SystemExit):
        cli.main()
    assert len(again) == 4 * (2 + 2) - 10  # rates and seeds of all weights and of the adapters that fit, without those done before
    rows = {row["method"]: row for row in json.loads((folder / "out" / "comparison.json").read_text())["rows"]}
    assert rows["nothing"]["score"] > rows["all weights"]["score"]
    assert rows["adapt.lora"]["trained"] <= 4550
    assert rows["adapt.parallel"]["settings"]["activation"] == "relu"
    assert (rows["adapt.lora"]["merges"], "no change of a weight" in rows["adapt.series"]["merges"]) == ("yes", True)
    assert "no setting makes them fewer; 4,550 are allowed" in rows["adapt.ssf"]["why not"]
    assert rows["adapt.lora"]["optimizer_bytes"] == 8 * rows["adapt.lora"]["trained"]
    assert rows["adapt.lora"]["score"] == pytest.approx(sum(rows["adapt.lora"]["scores"]) / 2)
    page = (folder / "out" / "README.md").read_text()
    assert "| adapt.lora (rank " in page
    assert "adapt.series stays beside the weights" in page
    assert "<svg" in (folder / "out" / "comparison.svg").read_text()
    assert "adapt.parallel" in capsys.readouterr().out
    assert not (folder / "out.steps").exists()


def test_classes_of_images_with_a_new_head_for_all(vit, tmp_path, monkeypatch):
    monkeypatch.setattr(labels, "read", lambda _: labels.stripes(300, turned=0.5))
    asked = {"compare": ["adapt.lora", "adapt.lora_ga"], "tasks": {"mine": {"model": str(vit), "data": "turned stripes"}},
             "save": str(tmp_path / "out"), **ASKED, "seeds": [0]}  # fmt: skip
    rows = {row["method"]: row for row in mw.compare(asked)}
    assert rows["nothing"]["trained"] == 0
    assert rows["all weights"]["trained"] == sum(
        value.numel() for name, value in small.vit(1).named_parameters() if "classifier" not in name
    )
    assert 0 < rows["adapt.lora"]["trained"] <= 0.04 * sum(value.numel() for value in small.vit(1).parameters())
    assert rows["adapt.lora"]["column"] == "right"
    assert rows["adapt.lora"]["spread"] is None
    assert "next tokens of a text" in rows["adapt.lora_ga"]["why not"]


def test_the_head_begins_anew_also_where_it_has_the_size_that_is_asked_for(vit, tmp_path):
    task = compare.LabelTask("mine", compare.read(stated(tmp_path, ["adapt.lora"])), str(vit), labels.stripes(100))
    before = small.vit(20).classifier.weight
    assert task.model.module.classifier.weight.shape == before.shape
    assert not torch.allclose(task.model.module.classifier.weight, before, atol=1e-3)
    assert torch.equal(task.model.module.vit.embeddings.cls_token, small.vit(20).vit.embeddings.cls_token)
    assert task.new == {"classifier.weight", "classifier.bias"}


def test_what_a_step_holds_by_hand():
    # y = W x keeps x [4, 8] for W's gradient, and its output squared keeps that [4, 2]; W's gradient is [2, 8]: 4 (32 + 8 + 16) bytes.
    layer, inputs = nn.Linear(8, 2, bias=False), torch.randn(4, 8)
    found = compare.step_bytes(layer, torch.zeros(1, 2, dtype=torch.long), lambda module, ids, mask: (module(inputs).square().sum(), {}))
    assert found == 4 * (32 + 8 + 16)


def test_what_a_step_holds_of_sparse_tensors_is_their_entries_and_places():
    places, values = torch.tensor([[0, 1, 1], [0, 2, 3]]), torch.ones(3, requires_grad=True)
    layer, inputs = nn.Linear(1, 1).requires_grad_(False), torch.randn(4, 2)

    def loss(module, ids, mask):
        return torch.sparse.mm(torch.sparse_coo_tensor(places, values, (2, 4)), inputs).sum(), {}

    assert compare.step_bytes(layer, torch.zeros(1, 2, dtype=torch.long), loss) >= places.nbytes + 4 * 3 + inputs.nbytes


def test_all_that_is_wrong_is_said_at_once(tmp_path):
    wrong = {
        "compare": ["adapt.lroa", "prune.magnitude", {"adapt.lora": {"rank": 0}}],
        "tasks": {"a": {"model": "starter", "examples": [1]}},
    }
    with pytest.raises(RecipeError) as error:
        compare.read(wrong | {"token": 5, "batch": 0, "seeds": 3})
    for words in (
        "no key 'token'. Did you mean 'tokens'", "method 0: There is no method 'adapt.lroa'", "method 1: prune.magnitude is no adapter",
        "method 2: adapt.lora: rank", "tasks are names",
        "examples are a list", "batch must be a whole number", "seeds must be a list", "Add `save: folder/`",
    ):  # fmt: skip
        assert words in str(error.value), words
    assert not list(tmp_path.iterdir())


def test_models_that_are_made_are_the_same_each_time():
    one, two = small.vit(3).state_dict(), small.vit(3).state_dict()
    assert all(torch.equal(value, two[name]) for name, value in one.items())


def test_an_encoder_is_made_and_classifies_text(tmp_path):
    words = [f"{number} {LETTERS[number % 30 : number % 30 + 64]}" for number in range(60)]
    small.encoder(mw.core.data.read([" ".join(words)]), tmp_path / "encoder", steps=2)
    examples = labels.Labelled("words", torch.arange(60) % 3, 3, texts=tuple(words))
    asked = compare.read(stated(tmp_path, ["adapt.lora"], length=64))
    task = compare.LabelTask("mine", asked, str(tmp_path / "encoder"), examples)
    assert task.each == 64
    assert {name.partition(".")[0] for name in task.new} >= {"classifier"}
    assert 0 <= task.kept(tmp_path, task.asked.methods[0], 0.01, 0, tuning=False).score <= 1

"""Recipes: YAML and Python, what is given, hashes, and what is kept."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

import modelwright as mw
from modelwright.core import find, recipe
from modelwright.core.errors import DataError, PlanError, RecipeError
from modelwright.core.files import claim
from modelwright.core.recipe import Recipe, Step

Magnitude, Rtn, Train, Recover = (find.find(name) for name in ("prune.magnitude", "quantize.rtn", "train", "distill.recover"))
SHORT = {"tokens": 64, "batch": 2, "length": 16}


def test_yaml_and_python_print_each_other():
    made = Recipe(
        model="starter",
        data={"source": "my.txt", "held": [0.1, 0.2]},
        steps=(
            Step(Magnitude(sparsity={"mlp": [0.2, 0.4]}, skip="block 0")),
            Step(Recover(tokens=1000), {"teacher": "$input"}),
            Step(Rtn()),
        ),
        seed=3,
        save="out",
    )
    assert recipe.read(made.yaml()) == made
    assert "prune.magnitude" in made.yaml()
    assert "- quantize.rtn\n" in made.yaml()


def test_on_and_small_numbers_are_what_they_look_like():
    stated = recipe.parse("model: on\nsteps:\n- train: {learning_rate: 1e-4}\n")
    assert stated == {"model": "on", "steps": [{"train": {"learning_rate": 1e-4}}]}


def test_overrides_reach_models_settings_and_bare_steps():
    stated = {"model": "a", "steps": ["quantize.rtn", {"prune.wanda": {"sparsity": 0.5}}]}
    made = recipe.read(stated, ["model=b", "steps.0.bits=8", "steps.1.sparsity={mlp: 0.7}", "seed=4"])
    assert (made.model, made.seed, made.steps[0].method.bits) == ("b", 4, 8)
    assert made.steps[1].method.sparsity == {"mlp": 0.7}


@pytest.mark.parametrize(
    ("stated", "sentence"),
    [
        ({"steps": ["prune.magnitude"], "save": 5}, "save must be a text"),
        ({"steps": ["prune.magnitude"], "model": [1]}, "model must be a text or a mapping"),
        ({"steps": ["prune.magnitude"], "seed": "x"}, "seed must be a whole number"),
        ({"steps": [{"merge.ties": {"donors": "starter"}}]}, "donors must be a list of models"),
        ({"steps": [{"merge.ties": {"donors": [5]}}]}, "donors must be a list of models"),
        ({"steps": []}, "A recipe needs `steps:`"),
        ({"steps": [{"a": 1, "b": 2}]}, "one method with its settings"),
    ],
)
def test_wrong_kinds_are_said_before_work(stated, sentence):
    with pytest.raises(RecipeError, match=sentence):
        recipe.read(stated)


@pytest.mark.parametrize("held", ["abc", 2.0, None, [0.1, "x"]])
def test_data_mapping_is_checked(held):
    with pytest.raises(RecipeError, match="held"):
        recipe.read_data({"source": "corpus", "held": held})


def test_input_is_the_input_also_after_steps_in_memory(small, text, tmp_path, monkeypatch):
    teachers = []
    loss = Recover.loss

    def seen(self, module, ids, mask, teacher):
        teachers.append({name: value.clone() for name, value in teacher.state_dict().items()})
        return loss(self, module, ids, mask, teacher)

    monkeypatch.setattr(Recover, "loss", seen)
    steps = [Train(**SHORT, learning_rate=0.01), Step(Recover(**SHORT), {"teacher": "$input"})]
    mw.run(str(small), steps, data=str(text), save=str(tmp_path / "out"))
    original = mw.open(small).module.state_dict()
    assert all(torch.equal(value, original[name]) for name, value in teachers[0].items())


def test_folder_for_steps_is_left_alone(small, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "precious.txt").write_text("mine")
    mw.run(str(small), [Magnitude()], save=str(tmp_path / "out"), work=tmp_path / "mine")
    assert (tmp_path / "mine" / "precious.txt").read_text() == "mine"


def test_what_a_killed_run_left_beside_does_not_come_into_the_result(small, tmp_path):
    claim(tmp_path / "out.partial")
    (tmp_path / "out.partial" / "junk.safetensors").write_text("junk")
    mw.run(str(small), [Magnitude()], save=str(tmp_path / "out"))
    assert not (tmp_path / "out" / "junk.safetensors").exists()


def test_inputs_are_never_the_place_to_save(small, tmp_path):
    with pytest.raises(RecipeError, match="is, or holds, the input"):
        mw.run(str(small), [Magnitude()], save=str(small), overwrite=True)


def test_digest_changes_with_any_byte_and_with_changes_in_memory(small):
    model = mw.open(small)
    before = recipe.model_digest(model)
    assert recipe.model_digest(mw.open(small)) == before
    mw.apply(model, Magnitude())
    assert recipe.model_digest(model) != before


def test_model_in_memory_runs_and_its_recipe_names_it(small, tmp_path):
    done = mw.run(mw.open(small), [Magnitude()], save=str(tmp_path / "out"))
    assert recipe.read(str(tmp_path / "out" / "recipe.yaml")).model == str(small)
    assert [row["step"] for row in done.account] == ["input", "prune.magnitude"]


def test_adapter_takes_its_base_along_when_a_step_made_it(small, text, tmp_path):
    steps = [Magnitude(), find.find("adapt.lora")(rank=2), Train(**SHORT)]
    mw.run(str(small), steps, data=str(text), save=str(tmp_path / "out"))
    stated = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert stated["base_model_name_or_path"] == str(tmp_path / "out" / "base")
    assert mw.open(tmp_path / "out").module is not None


def test_account_says_where_a_prediction_was_wrong(small, tmp_path):
    done = mw.run(str(small), [Magnitude(sparsity=0.5), Rtn(group=32)], save=str(tmp_path / "out"))
    assert all(not any("were predicted" in note for note in row.get("notes", [])) for row in done.account)
    row = {"step": "x", "bytes_memory": 1000, "zeros": 0, "parameters": 1000}
    expected = type("Row", (), {"bytes": 500, "zeros": 500})()
    assert len(recipe._surprises(expected, row)) == 2


@pytest.mark.parametrize(
    ("step", "line"),
    [
        ({"quantize.rtn": {"group": 32, "symmetric": False}}, "import modelwright"),
        ({"quantize.rtn": {"group": 32}}, "compressed-tensors"),
        ("prune.magnitude", "loads with plain transformers"),
        ("adapt.lora", "AutoPeftModelForCausalLM"),
    ],
)
def test_every_run_writes_a_card_that_says_how_to_load(step, line, small, tmp_path):
    made = recipe.read({"model": str(small), "steps": [step], "save": str(tmp_path / "out")})
    mw.run(made)
    card = (tmp_path / "out" / "README.md").read_text("utf-8")
    assert line in card
    assert made.yaml() in card
    assert "| on disk |" in card


def test_texts_of_donors_keep_their_place_and_count_in_what_is_resumed(small, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    other = shutil.copytree(small, tmp_path / "other")
    for name, words in (("a", "the quick brown fox "), ("b", "0123456789 ")):
        (tmp_path / f"{name}.txt").write_text(words * 60)
    stated = {
        "model": str(small), "length": 16, "samples": 2, "save": "out",
        "steps": [{"merge.regmean": {"donors": [str(small), str(other)], "texts": ["a.txt", "corpus"]}}],
    }  # fmt: skip
    whole = recipe.whole_names(recipe.read(stated))
    assert whole.steps[0].method.texts == (str(tmp_path / "a.txt"), "corpus")
    stated["steps"][0]["merge.regmean"]["texts"] = ["a.txt", "b.txt"]
    made = recipe.read(stated)
    recipe.run(made, keep_steps=True)
    (tmp_path / "b.txt").write_text("other words " * 60)
    recipe.run(made, keep_steps=True, overwrite=True)
    assert len(list((tmp_path / "out.steps").glob("00-merge.regmean-*.json"))) == 2


def test_every_problem_of_a_recipe_names_its_step():
    steps = [
        {"prune.wanda": {"sparsity": 2, "sparcity": 1, "allocate": "all"}},
        "prune.none",
        {"prune.wanda": {"by_sum": True, "pattern": "2:4"}},
    ]
    with pytest.raises(RecipeError) as caught:
        recipe.read({"steps": steps})
    assert len(caught.value.reasons) == 5
    assert [reason[:8] for reason in caught.value.reasons] == ["step 0: "] * 3 + ["step 1: ", "step 2: "]
    assert "step 0: prune.wanda: sparsity must be a number from 0 to 1; got 2." in caught.value.reasons


@pytest.mark.parametrize(
    "step", [{"prune.gaprune": {"general": "nowhere.txt"}}, {"merge.regmean": {"donors": ["$input"], "texts": ["nowhere.txt"]}}]
)
def test_texts_of_a_step_that_cannot_be_read_are_said_before_work(step, small, text, tmp_path):
    made = recipe.read({"model": str(small), "data": str(text), "steps": ["prune.magnitude", step], "save": str(tmp_path / "out")})
    for call in (mw.plan, mw.run):
        with pytest.raises(DataError, match=rf"step 1: {next(iter(step))}: The data 'nowhere.txt' was asked for"):
            call(made)
    assert list(tmp_path.iterdir()) == []


def test_what_is_refused_in_the_course_of_a_run_names_its_step(small, text, tmp_path):
    step = {"factor.asvd": {"keep": 0.1, "keeps": [0.5], "where": "mlp.down"}}
    with pytest.raises(PlanError, match=r"^step 1: factor\.asvd: keep=0\.1 was asked for"):
        mw.run({"model": str(small), "data": str(text), "steps": ["prune.magnitude", step], "save": str(tmp_path / "out")})


def test_a_step_may_have_text_of_its_own(small, text, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text("\n\n".join(f"{word} is not {word[::-1]}" for word in map(str, range(1000, 1400))))
    stated = {"model": str(small), "data": str(text), "save": str(tmp_path / "out"),
              "steps": [{"quantize.gptq": {"group": 32, "data": str(other)}}]}  # fmt: skip
    made = recipe.read(stated | {"samples": 4, "length": 32})
    assert recipe.read(made.yaml()) == made
    found = mw.run(made).model
    alone = mw.run(
        recipe.read(made.plain() | {"data": str(other), "steps": [{"quantize.gptq": {"group": 32}}], "save": str(tmp_path / "b")})
    )
    usual = mw.run(recipe.read(made.plain() | {"steps": [{"quantize.gptq": {"group": 32}}], "save": str(tmp_path / "c")}))
    own, same, not_same = (one.module.state_dict() for one in (found, alone.model, usual.model))
    assert all(torch.equal(value, same[name]) for name, value in own.items())
    assert not all(torch.equal(value, not_same[name]) for name, value in own.items())
    assert recipe.read(tmp_path / "out" / "recipe.yaml").steps[0].given == {"data": str(other)}
    del stated["data"]
    assert len(mw.plan(recipe.read(stated)).rows) == 2  # the recipe itself needs none
    stated["steps"][0]["quantize.gptq"]["data"] = str(tmp_path / "none.txt")
    with pytest.raises(DataError, match=r"step 0: quantize.gptq: data: The data .*none.txt"):
        mw.plan(recipe.read(stated))
    with pytest.raises(RecipeError, match=r"step 0: prune.magnitude has no setting 'data'"):
        recipe.read({"steps": [{"prune.magnitude": {"data": "corpus"}}]})
    with pytest.raises(RecipeError, match="data must be a text"):
        recipe.read({"steps": [{"prune.wanda": {"data": 5}}]})

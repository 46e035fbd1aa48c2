"""Every mistake is one sentence that says what was asked, what was found and what to do; nothing is lost or half-written."""

from __future__ import annotations

import errno
import json
import shutil
import sys

import pytest
import torch
from killing import TEXT
from safetensors.torch import load_file, save_file

import modelwright as mw
from modelwright import cli
from modelwright.core import recipe, stream, walk, weights
from modelwright.core.contract import LETTERS, letters
from modelwright.core.errors import (
    DataError,
    LayoutError,
    MethodError,
    ModelError,
    ModelwrightError,
    NeedError,
    PlanError,
    RecipeError,
    SettingError,
    SiteError,
    WeightsError,
)  # fmt: skip
from modelwright.core.find import find
from modelwright.core.given import Given
from modelwright.core.model import Model
from modelwright.core.tiny import tiny, tiny_inputs
from modelwright.fit import fit

Rtn, Gptq, Magnitude, Ties = (find(name) for name in ("quantize.rtn", "quantize.gptq", "prune.magnitude", "merge.ties"))


def said(capsys, monkeypatch, *arguments: object) -> str:
    """What the command line says before it exits with 2."""
    monkeypatch.setattr(sys, "argv", ["modelwright", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    shown = capsys.readouterr()
    assert "Traceback" not in shown.err
    return " ".join(shown.err.split())


def test_unknown_method_names_the_nearest(capsys, monkeypatch, tmp_path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text("model: starter\nsteps:\n- prune.wnada\nsave: out\n")
    assert "There is no method 'prune.wnada'. Did you mean 'prune.wanda'?" in said(capsys, monkeypatch, "run", recipe)
    assert "Did you mean 'quantize.gptq'?" in said(capsys, monkeypatch, "show", "gptq")
    assert "There is no family 'prun'. Did you mean 'prune'?" in said(capsys, monkeypatch, "list", "prun")


def test_all_that_is_wrong_in_a_recipe_is_said_at_once(capsys, monkeypatch, tmp_path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text("modle: starter\nsteps:\n- prune.wanda: {sparsty: 0.5}\n- quantize.rtn: {bits: 9, group: many}\nsave: out\n")
    text = said(capsys, monkeypatch, "run", recipe)
    assert "A recipe has no key 'modle'. Did you mean 'model'?" in text
    assert "prune.wanda has no setting 'sparsty'. Did you mean 'sparsity'?" in text
    assert "quantize.rtn: bits must be a whole number from 2 to 8 bits; got 9." in text
    assert "quantize.rtn: group must be a whole number" in text


def test_recipe_that_is_no_yaml(capsys, monkeypatch, tmp_path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text("steps: [unclosed\n")
    assert "not valid YAML" in said(capsys, monkeypatch, "run", recipe)
    assert "There is no recipe" in said(capsys, monkeypatch, "run", tmp_path / "none.yaml")


@pytest.mark.parametrize("override", ["steps.0", "steps.9.bits=2", "nonsense", "steps.0=3"])
def test_override_that_fits_nowhere(override: str, tmp_path, small) -> None:
    with pytest.raises(RecipeError, match="override|--set"):
        recipe.read({"model": str(small), "steps": ["prune.magnitude"]}, [override])


def test_steps_that_cannot_follow_each_other(small, text, tmp_path) -> None:
    with pytest.raises(PlanError, match=r"prune.magnitude wants a model that is float, but step 0 \(quantize.rtn\) leaves it without"):
        mw.run(str(small), [Rtn(group=32), Magnitude()], save=str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_unknown_model_type_names_the_nearest(small, tmp_path) -> None:
    folder = shutil.copytree(small, tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "lama"}))
    with pytest.raises(ModelError, match=r"no model type 'lama'. Did you mean 'llama'\?"):
        mw.open(folder)


def test_code_in_a_model_folder_is_not_run(small, tmp_path) -> None:
    folder = shutil.copytree(small, tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "mine", "auto_map": {"AutoConfig": "evil.Config"}}))
    (folder / "evil.py").write_text("raise SystemExit('this code must not run')\n")
    with pytest.raises(ModelError, match="trust-remote-code"):
        mw.open(folder)


@pytest.mark.parametrize(
    ("budget", "sentence"), [("cheap", "written 40%"), ("0%", "leaves no byte"), ("1kB", "The nearest has"), ("-3MB", "written 40%")]
)
def test_impossible_budget(budget: str, sentence: str, small, text, tmp_path) -> None:
    with pytest.raises(PlanError, match=sentence):
        fit(small, budget=budget, data=text, quick=True, trials=1, save=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_text_that_cannot_be_used(small, tmp_path) -> None:
    empty, tiny_text, binary = tmp_path / "empty.txt", tmp_path / "tiny.txt", tmp_path / "binary.txt"
    empty.write_text("")
    tiny_text.write_text("ab")
    binary.write_bytes(b"good \xff\xfe bad")
    for file, sentence in ((empty, "empty"), (tiny_text, "tokens"), (binary, "UTF-8"), (tmp_path / "none.txt", "none.txt")):
        with pytest.raises(DataError, match=sentence):
            mw.apply(small, Gptq(group=32), data=str(file))


def test_missing_needs_are_said_before_the_model_is_read(small, tmp_path) -> None:
    with pytest.raises(NeedError, match="prune.wanda needs calibration text; the recipe gives none. Add `data:`"):
        mw.apply(small, find("prune.wanda")())
    with pytest.raises(NeedError, match=r"(?s)step 0: merge.ties needs donors.*step 1: quantize.gptq needs calibration text"):
        mw.run(str(small), [Ties(), Gptq()], save=str(tmp_path / "out"))


def test_tokenizer_is_missing_or_of_another_model(small, text, tmp_path) -> None:
    bare = shutil.copytree(small, tmp_path / "bare")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (bare / file).unlink()
    with pytest.raises(NeedError, match=r"no tokenizer.*Copy tokenizer.json"):
        mw.apply(bare, Gptq(group=32), data=str(text))
    smaller = tmp_path / "smaller"
    Model(name="smaller", module=tiny("llama", vocab_size=40), tokenizer=letters()).save(smaller)
    with pytest.raises(ModelError, match="tokenizer"):
        mw.apply(smaller, Gptq(group=32), data=str(text))


def test_where_that_chooses_nothing(small, text) -> None:
    with pytest.raises(SiteError, match="names no part of any model. Did you mean"):
        mw.apply(small, Magnitude(where="attnn"))
    with pytest.raises(SiteError, match="chooses no weight. This model has the roles"):
        mw.apply(small, Magnitude(where="experts"))
    model = mw.apply(Model(name="tied", module=tiny("llama", tie_word_embeddings=True)), Magnitude(where=("attn", "head", "mlp.up")))
    found = "'head' in where chooses no weight of this model; where the head has the embedding's weight, it is `embed`"
    assert model.history[-1]["notes"] == [f"prune.magnitude: {found}"]


def test_what_cannot_be_is_refused_before_text_runs(small, text, monkeypatch) -> None:
    monkeypatch.setattr(walk.Resident, "enter", lambda *_: pytest.fail("the text was run"))
    with pytest.raises(PlanError, match="all 4 blocks of model.layers would go"):
        mw.apply(mw.open(small), find("prune.shortgpt")(blocks=4), data=str(text))
    with pytest.raises(SiteError, match="^prune.wanda: sparsity: 'foo' names no part of any model"):
        mw.apply(mw.open(small), find("prune.wanda")(sparsity={"foo": 0.6}), data=str(text))
    with pytest.raises(LayoutError, match="no channels to remove; it has mlp, heads, residual"):
        mw.apply(mw.open(small), find("prune.llm_pruner")(units=("channels",)), data=str(text))


def test_donors_of_other_shapes_are_named(small, tmp_path) -> None:
    Model(name="wide", module=tiny("llama", intermediate_size=96)).save(tmp_path / "wide")
    other = shutil.copytree(small, tmp_path / "other")
    for save in (None, tmp_path / "out"):
        with pytest.raises(ModelError, match=r"tensors have other shapes, first model.layers.0.mlp.(gate|down|up)_proj.weight"):
            mw.apply(small, Ties(), donors=[tmp_path / "wide", other], save=save)
    assert not (tmp_path / "out").exists()
    with pytest.raises(SettingError, match="3 weights for 2 donors"):
        mw.apply(small, Ties(weights=(1, 2, 3)), donors=[small, small])


def test_corrupt_shard_is_found_before_work(small, text, tmp_path) -> None:
    folder = shutil.copytree(small, tmp_path / "m")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(WeightsError, match=r"(?i)truncated|past the end|ends"):
        mw.run(str(folder), [Magnitude()], save=str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_nan_weights_are_found_before_work(small, tmp_path) -> None:
    folder = shutil.copytree(small, tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(WeightsError, match="model.norm.weight"):
        mw.run(str(folder), [Magnitude()], save=str(tmp_path / "out"))


@pytest.mark.parametrize("name", ["prune.magnitude", "prune.wanda", "prune.sparsegpt", "prune.armor", "prune.alps",
                                  "quantize.rtn", "quantize.gptq", "factor.svd", "factor.svd_llm", "factor.asvd"])  # fmt: skip
def test_a_matrix_that_is_nan_is_found_before_those_before_it_are_changed(name: str) -> None:
    module = tiny("llama")
    module.model.layers[3].mlp.down_proj.weight.data[5, 7] = float("nan")  # the last; its outputs are no matrix's inputs
    before = {key: value.clone() for key, value in module.state_dict().items()}
    method = find(name)
    with pytest.raises(WeightsError, match=r"1 tensors hold NaN or infinity, first model\.layers\.3\.mlp\.down_proj\.weight"):
        mw.apply(module, method(**method.small), data=[tiny_inputs(module)])
    assert module.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[key]) or value.isnan().any() for key, value in module.state_dict().items())


@pytest.mark.parametrize("name", ["prune.magnitude", "quantize.rtn", "quantize.gptq", "prune.shortgpt"])
def test_from_folder_to_folder_too(name: str, tmp_path) -> None:
    module = tiny("llama")
    module.model.layers[0].mlp.up_proj.weight.data[5, 7] = float("nan")
    Model(name="broken", module=module).save(tmp_path / "in")
    method = find(name)
    with pytest.raises(WeightsError, match=r"(?s)NaN or infini.*model\.layers\.0\.mlp\.up_proj\.weight|up_proj\.weight.*NaN or infini"):
        mw.apply(tmp_path / "in", method(**method.small), data=[tiny_inputs(module)], save=tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


@pytest.mark.parametrize("name", ["prune.wanda", "factor.asvd"])
def test_infinite_activations_are_named_and_experts_stay_in_their_stacks(name: str) -> None:
    module = tiny("qwen3_moe")
    module.model.layers[1].self_attn.v_proj.weight.data *= 1e38
    names = module.state_dict().keys()
    with pytest.raises(SiteError, match=r"NaN or infinite on the (calibration data|text)"):
        mw.apply(module, find(name)(**find(name).small), data=[tiny_inputs(module)])
    assert module.state_dict().keys() == names


@pytest.mark.parametrize("streamed", [True, False])
def test_full_disk_leaves_nothing_behind(streamed: bool, small, tmp_path, monkeypatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    model = mw.open(small)
    if not streamed:
        _ = model.module  # in memory it may have been changed, so it is not streamed
        monkeypatch.setattr(type(model.module), "save_pretrained", full)
    assert stream.possible(model, Magnitude()) is streamed
    monkeypatch.setattr(weights, "_write", full)
    with pytest.raises(WeightsError, match="disk"):
        mw.apply(model, Magnitude(), save=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_full_folder_is_not_overwritten_unasked(small, text, tmp_path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious.txt").write_text("mine")
    for work in (
        lambda: mw.run(str(small), [Magnitude()], save=str(tmp_path / "out")),
        lambda: fit(small, data=text, save=tmp_path / "out"),
        lambda: mw.apply(small, Magnitude(), save=tmp_path / "out"),
        lambda: mw.apply(tiny("llama"), Magnitude(), save=tmp_path / "out"),
    ):
        with pytest.raises(ModelwrightError, match="out"):
            work()
    assert (tmp_path / "out" / "precious.txt").read_text() == "mine"


def test_inputs_on_disk_are_never_touched(small, text, tmp_path) -> None:
    before = {path.name: path.read_bytes() for path in small.iterdir()}
    mw.run(str(small), [Magnitude(), Rtn(group=32)], save=str(tmp_path / "out"))
    fit(small, budget="60%", data=text, quick=True, trials=1, save=tmp_path / "fitted")
    assert {path.name: path.read_bytes() for path in small.iterdir()} == before


def test_experts_without_tokens_are_said() -> None:
    module = tiny("qwen3_moe", num_experts=32, num_experts_per_tok=1)
    given = Given(data=[{"input_ids": torch.tensor([[1, 2, 3]])}])
    walk.change(Model(name="moe", module=module), find("prune.wanda")(), given)
    assert any("saw no calibration token" in note for note in given.notes)


def test_broken_outside_method_is_an_error(tmp_path) -> None:
    (tmp_path / "mine.py").write_text("1/0\n")
    with pytest.raises(MethodError, match="ZeroDivisionError"):
        find(f"{tmp_path / 'mine.py'}:Mine")
    with pytest.raises(MethodError, match="no file"):
        find(f"{tmp_path / 'other.py'}:Mine")


def test_texts_of_the_fixtures_are_in_the_tokenizer() -> None:
    assert set(TEXT) - {"\n"} <= set(LETTERS)


# All reasons at once


def reasons(small, steps: list, **others: object) -> ModelwrightError:
    """What a plan says of a recipe that cannot be run."""
    from modelwright.core.plan import plan

    with pytest.raises(ModelwrightError) as caught:
        plan({"model": str(small), "steps": steps, **others})
    return caught.value


def test_reasons_of_every_kind_are_said_at_once_in_the_order_of_the_steps(small, tmp_path) -> None:
    steps = [
        {"prune.wanda": {"where": ["attn", "attnn"], "skip": "mpl"}},
        {"merge.ties": {"donors": [str(tmp_path / "none"), str(small)]}},
        {"prune.magnitude": {"where": "experts"}},
        {"quantize.rtn": {"bits": {"mlpp": 3}}},
        "prune.magnitude",
        "distill.recover",
    ]
    error = reasons(small, steps)
    assert type(error) is ModelwrightError
    said = [
        "step 0: prune.wanda needs calibration text",
        "step 0: prune.wanda: where: 'attnn' names no part of any model. Did you mean 'attn'?",
        "step 0: prune.wanda: skip: 'mpl' names no part of any model. Did you mean 'mlp'?",
        "step 1: merge.ties: donors: A checkpoint at",
        "step 2: prune.magnitude: where='experts' skip=None chooses no weight",
        "step 3: quantize.rtn: bits: 'mlpp' names no part of any model. Did you mean 'mlp'?",
        "step 4: prune.magnitude wants a model that is float, but step 3 (quantize.rtn)",
        "step 5: distill.recover needs training text",
        "step 5: distill.recover needs a teacher",
    ]
    found = {start: [text for text in error.reasons if text.startswith(start)] for start in said}
    assert all(len(texts) == 1 for texts in found.values()), error.reasons
    steps_said = [int(text.split()[1].rstrip(":")) for text in error.reasons]
    assert steps_said == sorted(steps_said)
    assert str(error).startswith(f"{len(error.reasons)} problems:\n")


def test_run_says_the_same_and_where_it_cannot_save(small, tmp_path) -> None:
    recipe_ = {"model": str(small), "steps": [{"prune.magnitude": {"where": "attnn"}}], "save": str(small)}
    with pytest.raises(ModelwrightError, match=r"(?s)is, or holds, the input.*step 0: prune.magnitude: where: 'attnn'"):
        mw.run(recipe.read(recipe_))


def test_reasons_of_one_kind_keep_their_class(small) -> None:
    error = reasons(small, [{"prune.magnitude": {"where": "attnn"}}, {"factor.svd": {"skip": "mpl"}}])
    assert type(error) is SiteError
    assert len(error.reasons) == 2


def test_weights_that_cannot_take_a_setting_are_said_with_the_step(tmp_path, text) -> None:
    Model(name="odd", module=tiny("llama", hidden_size=36, num_attention_heads=2, num_key_value_heads=1), tokenizer=letters()).save(
        tmp_path / "odd"
    )
    error = reasons(tmp_path / "odd", [{"prune.wanda": {"pattern": "4:8"}}, "distill.recover"])
    assert any(line.startswith("step 0: prune.wanda needs calibration text") for line in error.reasons)
    assert any(line.startswith("step 0: prune.wanda: ") and "cannot take it" in line for line in error.reasons), error.reasons
    assert any(line.startswith("step 1: distill.recover needs a teacher") for line in error.reasons)


def test_model_and_text_that_are_not_there_are_said_together(tmp_path) -> None:
    error = reasons(tmp_path / "none", ["prune.wanda"], data=str(tmp_path / "none.txt"))
    assert [text.split(":")[0] for text in error.reasons] == ["data", "model"]


def test_override_says_how_many_steps_there_are(small) -> None:
    with pytest.raises(RecipeError, match="steps.9.bits=2: the recipe has 2 steps, numbered 0 to 1; there is no step 9"):
        recipe.read({"model": str(small), "steps": ["prune.magnitude", "quantize.rtn"]}, ["steps.9.bits=2"])


def test_yaml_that_cannot_be_read_is_named(tmp_path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("steps: [unclosed\n")
    with pytest.raises(RecipeError, match="mine.yaml is not valid YAML"):
        recipe.read(file)

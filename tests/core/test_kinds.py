"""What two models must share to be merged, said alike by a method and by a configuration; and what is only noted."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import tiny

import modelwright as mw
from modelwright.core.contract import letters
from modelwright.core.errors import MethodError, ModelError, PlanError, SettingError
from modelwright.core.kinds import Kind, differences
from modelwright.core.model import Model
from modelwright.methods.merge.fisher import Fisher
from modelwright.methods.merge.linear import Linear
from modelwright.methods.merge.moe import Moe
from modelwright.methods.merge.regmean import Regmean
from modelwright.methods.merge.ties import Ties

Q = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture
def donor(tmp_path):
    """A model like `small`, its files to be changed: donor(config={...}, tensors=..., tokens=...)."""

    def made(config=None, tensors=lambda _: None, tokens=lambda _: None):
        folder = tmp_path / "donor"
        Model(name="donor", module=tiny("llama", seed=5), tokenizer=letters()).save(folder)
        for name, change in (("config.json", lambda stated: stated.update(config or {})), ("tokenizer.json", tokens)):
            stated = json.loads((folder / name).read_text("utf-8"))
            change(stated)
            (folder / name).write_text(json.dumps(stated), "utf-8")
        held = load_file(folder / "model.safetensors")
        tensors(held)
        save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    return made


def both_ways(small, folder, save):
    """A merge by method, held and streamed, and one by configuration."""
    stated = {"merge_method": "ties", "base_model": str(small), "models": [{"model": str(folder), "parameters": {"weight": 1}}]}
    yield lambda: mw.apply(small, Ties(), donors=[folder])
    yield lambda: mw.apply(small, Ties(), donors=[folder], save=save / "by method")
    yield lambda: mw.merge(stated, save=save / "by configuration")


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"model_type": "mistral", "architectures": ["MistralForCausalLM"]}, "of one architecture; found llama: .*; mistral: .*donor"),
        ({"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}, "num_attention_heads 8; .*donor has 4"),
    ],
)
def test_other_architectures_and_heads_of_the_same_shapes_are_refused(small, donor, tmp_path, config, sentence):
    for merge in both_ways(small, donor(config), tmp_path):
        with pytest.raises(ModelError, match=sentence):
            merge()
    assert [path.name for path in tmp_path.iterdir()] == ["donor"]


@pytest.mark.parametrize("number", [0, 1])
def test_a_plan_says_what_a_merge_of_any_step_would_refuse(small, donor, number):
    other = donor({"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16})
    before = [{"prune.magnitude": {"sparsity": 0.5}}] * number
    with pytest.raises(ModelError, match=rf"step {number}: merge.ties: .*num_attention_heads 8; .*donor has 4"):
        mw.plan({"model": str(small), "steps": [*before, {"merge.ties": {"donors": [*[str(small)] * number, str(other)]}}], "save": "out"})


def test_a_plan_names_tensors_of_other_shapes(small, donor):
    other = donor(tensors=lambda held: held.update({Q: held[Q][:8]}))
    with pytest.raises(ModelError, match=rf"step 0: merge.ties: .*donor: 1 tensors have other shapes, first {Q}"):
        mw.plan({"model": str(small), "steps": [{"merge.ties": {"donors": [str(other)]}}], "save": "out"})


def test_a_matrix_of_whole_numbers_is_refused_by_name(small, donor, tmp_path):
    for merge in both_ways(small, donor(tensors=lambda held: held.update({Q: held[Q].to(torch.int8)})), tmp_path):
        with pytest.raises(ModelError, match=f"{Q}.*int8"):
            merge()


def exchanged(stated):
    words = stated["model"]["vocab"]
    words["a"], words["b"] = words["b"], words["a"]


def test_exchanged_tokens_and_other_positions_are_noted(small, donor, tmp_path):
    rope = json.loads((small / "config.json").read_text("utf-8"))["rope_parameters"]
    folder = donor({"rope_parameters": {**rope, "rope_theta": 77.0}}, tokens=exchanged)
    for merge in both_ways(small, folder, tmp_path):
        notes = merge().history[-1]["notes"]
        assert any("vocabularies that differ in 2 tokens, such as 'a'" in note for note in notes)
        assert any(note.startswith(f"{folder} has rope_theta 77.0, and {small} has {rope['rope_theta']}") for note in notes)
    united = {"merge_method": "linear", "models": [{"model": str(one), "parameters": {"weight": 1}} for one in (small, folder)],
              "tokenizer_source": "base", "base_model": str(small)}  # fmt: skip
    assert not any("vocabularies" in note for note in mw.merge(united, save=tmp_path / "by token").history[-1]["notes"])


def test_positions_are_compared_however_they_are_written():
    new = Kind("new", {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}})
    old = Kind("old", {"rope_theta": 10000, "rope_scaling": None})
    assert not differences(new, [old, Kind("silent", {})])
    (note,) = differences(new, [Kind("long", {"rope_theta": 10000, "rope_scaling": {"type": "linear", "factor": 2}})])
    assert note == "long has rope_type linear, and new has default, which the result keeps"


def test_like_models_leave_no_note(small, donor, tmp_path):
    for merge in both_ways(small, donor(), tmp_path):
        assert not merge().history[-1]["notes"]


def test_tensors_that_are_left_out_are_named(small, donor, tmp_path):
    for merge in both_ways(small, donor(tensors=lambda held: held.update(more=torch.ones(3))), tmp_path):
        notes = merge().history[-1]["notes"]
        assert any("donor: 1 tensors" in note and "left out" in note and "first more" in note for note in notes), notes


def test_a_donor_counts_once(small, donor, tmp_path):
    folder = donor()
    again = tmp_path / "again"
    again.symlink_to(folder)
    for method in (Ties(), Linear()):
        with pytest.raises(PlanError, match="again is listed more than once. Give it once, with the sum of its weights"):
            mw.run(str(small), [mw.core.recipe.Step(method, {"donors": [str(folder), str(again)]})], save=str(tmp_path / "out"))
        with pytest.raises(PlanError, match="listed more than once"):
            mw.apply(small, method, donors=[folder, folder], save=tmp_path / "out")
    with pytest.raises(PlanError, match="listed more than once"):
        mw.pack_tasks(small, [folder, again], save=tmp_path / "packed")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "donor"]


def test_experts_may_be_made_of_one_donor(small, donor, tmp_path):
    folder = donor()
    experts = {"base_model": str(small), "gate_mode": "random", "experts": [{"source_model": str(folder)}] * 2}
    assert mw.merge(experts, save=tmp_path / "mixture").config.num_local_experts == 2
    mw.apply(small, Moe(), donors=[folder, folder], save=tmp_path / "by method")


def test_the_model_is_a_donor_only_where_it_counts(small, donor, tmp_path):
    folder = donor()
    for name in (str(small), "$input"):
        with pytest.raises(PlanError, match="merge.ties: .* is the model itself, which has changed nothing"):
            mw.run(str(small), [mw.core.recipe.Step(Ties(), {"donors": [str(folder), name]})], save=str(tmp_path / "refused"))
        step = mw.core.recipe.Step(Linear(), {"donors": [str(folder), name]})
        merged = mw.run(str(small), [step], save=str(tmp_path / "out"), overwrite=True)
        one, two = (load_file(each / "model.safetensors")[Q] for each in (small, folder))
        assert torch.allclose(merged.model.checkpoint.read(Q), (one + two) / 2, atol=1e-6)
    assert not (tmp_path / "out.steps").exists()


def test_weights_that_are_all_zero_are_noted(small, donor, tmp_path):
    notes = mw.apply(small, Ties(weights=[0.0]), donors=[donor()], save=tmp_path / "out").history[-1]["notes"]
    assert notes == ["merge.ties: all weights are 0, so the model stays as it is"]


@pytest.mark.parametrize(
    ("method", "sentence"),
    [
        (Ties(weights=[1.0]), "1 weights for 2 donors. Give one for each donor"),
        (Ties(keep_each=[1.0, 0.5, 0.2]), "3 keep_each for 2 donors"),
        (Regmean(texts=["corpus"]), "1 texts for 2 donors"),
        (Fisher(weights=[1.0], texts=["corpus", "corpus"]), "1 weights for 2 donors"),
    ],
)
def test_settings_that_do_not_go_with_the_donors_are_refused_before_work(small, donor, tmp_path, method, sentence):
    folder = donor()
    other = shutil.copytree(folder, tmp_path / "other")
    step = mw.core.recipe.Step(method, {"donors": [str(folder), str(other)]})
    for use in (
        lambda: mw.run(str(small), [step], save=str(tmp_path / "out")),
        lambda: mw.plan(mw.Recipe(model=str(small), steps=(step,), save="out")),
        lambda: mw.apply(small, method, donors=[folder, other], save=tmp_path / "out"),
    ):
        with pytest.raises(SettingError, match=sentence):
            use()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["donor", "other"]


def test_one_donor_needs_no_list(small, donor):
    folder = donor()
    for one in (str(folder), folder, mw.open(folder), mw.open(folder).module):
        merged = mw.apply(small, Linear(), donors=one).module.state_dict()[Q]
        assert torch.equal(merged, load_file(folder / "model.safetensors")[Q])


def test_a_method_by_name_is_answered_with_its_class(small):
    for method in ("merge.ties", ["merge.ties"]):
        with pytest.raises(MethodError, match="not their names: from modelwright.methods.merge.ties import Ties. mw.run takes a recipe"):
            mw.apply(small, method)

"""Configurations as people write them run, and give sound models."""

import json
import shutil

import pytest
import torch
from tiny import outputs, tiny

import modelwright as mw
from modelwright.core.contract import letters
from modelwright.core.errors import ModelwrightError, RecipeError, WeightsError
from modelwright.core.model import Model
from modelwright.core.weights import Checkpoint, Writer
from modelwright.methods.adapt.lora import Lora
from modelwright.methods.merge.moe import Moe

CONFIGS = {
    "the sides of a slerp": """
slices:
  - sources:
      - model: a
        layer_range: [0, 4]
      - model: b
        layer_range: [0, 4]
merge_method: slerp
base_model: a
parameters:
  t:
    - filter: self_attn
      value: [0, 0.5, 0.3, 0.7, 1]
    - filter: mlp
      value: [1, 0.5, 0.7, 0.3, 0]
    - value: 0.5
dtype: bfloat16
""",
    "dare ties of instruct models": """
models:
  - model: c
    # No parameters necessary for base model
  - model: a
    parameters:
      density: 0.53
      weight: 0.4
  - model: b
    parameters:
      density: 0.53
      weight: 0.3
merge_method: dare_ties
base_model: c
parameters:
  int8_mask: true
dtype: bfloat16
""",
    "ties with gradients": """
models:
  - model: a
    parameters:
      density: [1, 0.7, 0.1] # density gradient
      weight: 1.0
  - model: b
    parameters:
      density: 0.5
      weight: [0, 0.3, 0.7, 1] # weight gradient
  - model: tied
    parameters:
      density: 0.33
      weight:
        - filter: mlp
          value: 0.5
        - value: 0
merge_method: ties
base_model: c
parameters:
  normalize: true
  int8_mask: true
dtype: float16
""",
    "a self merge": """
dtype: float16
merge_method: passthrough
slices:
  - sources:
    - layer_range: [0, 2]
      model: a
  - sources:
    - layer_range: [1, 3]
      model: a
  - sources:
    - layer_range: [2, 4]
      model: a
""",
    "blocks that begin as the identity": """
slices:
  - sources:
    - model: a
      layer_range: [0, 4]
  - sources:
    - model: a
      layer_range: [3, 4]
      parameters:
        scale:
          - filter: o_proj
            value: 0.0
          - filter: down_proj
            value: 0.0
          - value: 1.0
merge_method: passthrough
dtype: float32
""",
    "a soup": """
models:
  - model: a
    parameters: {weight: 1.0}
  - model: b
    parameters: {weight: 0.3}
  - model: c
    parameters: {weight: "0.5"}
merge_method: linear
dtype: torch.float16
tokenizer_source: union
chat_template: auto
""",
    "a breadcrumb merge": """
models:
  - model: a
    parameters: {weight: 0.5, density: 0.9, gamma: 0.01}
  - model: b
    parameters: {weight: 0.5, density: 0.9, gamma: 0.02}
merge_method: breadcrumbs_ties
base_model: c
tokenizer: {source: base, pad_to_multiple_of: 8}
out_dtype: bfloat16
""",
    "della": """
merge_method: della
base_model: c
models:
  - {model: a, parameters: {weight: 0.5, density: 0.6, epsilon: 0.2}}
  - {model: b, parameters: {weight: 0.5, density: 0.6, epsilon: 0.1}}
parameters: {normalize: true, lambda: 1.1}
""",
    "what was learned, taken away": """
merge_method: task_arithmetic
base_model: c
models: [{model: a, parameters: {weight: -0.5}}]
parameters: {rescale: true}
""",
    "the mean of many": "merge_method: model_stock\nbase_model: c\nmodels: [{model: a}, {model: b}]\nparameters: {filter_wise: true}\n",
    "selection by variance": "merge_method: sce\nbase_model: c\nmodels: [{model: a}, {model: b}]\nparameters: {select_topk: 0.5}\n",
    "arcs by weight": "merge_method: nuslerp\nmodels: [{model: a, parameters: {weight: 1}}, {model: b, parameters: {weight: 0.5}}]\n",
    "arcs by row": """
merge_method: nuslerp
base_model: c
models: [{model: a, parameters: {weight: 1}}, {model: b, parameters: {weight: 0.5}}]
parameters: {nuslerp_flatten: false}
""",
    "the middle of many arcs": """
merge_method: karcher
models: [{model: a}, {model: b}, {model: c}]
parameters: {max_iter: 5, tol: 1e-4}
""",
    "arcs from a base": """
merge_method: multislerp
base_model: c
models: [{model: a, parameters: {weight: 0.5}}, {model: b, parameters: {weight: 0.5}}]
""",
    "near swap": "merge_method: nearswap\nbase_model: c\nmodels: [{model: a}]\nparameters: {t: 0.001}\n",
    "agents that were reinforced": """
merge_method: ramplus_tl
base_model: c
models: [{model: a}, {model: b}]
parameters: {r: 0.1, alpha: 0.2, epsilon: 1e-5}
""",
    "agents, plainly": "merge_method: ram\nbase_model: c\nmodels: [{model: c}, {model: a}, {model: b}]\n",
    "trimmed and brought to size": """
merge_method: ties
base_model: c
models: [{model: a, parameters: {weight: 0.5, density: 0.3}}, {model: b, parameters: {weight: 0.5, density: 0.3}}]
parameters: {rescale: true}
""",
    "arcs by column": """
merge_method: nuslerp
models: [{model: a, parameters: {weight: 1}}, {model: b, parameters: {weight: 0.5}}]
parameters: {nuslerp_flatten: false, nuslerp_row_wise: true}
""",
    "arcs of any length": """
merge_method: multislerp
models: [{model: a, parameters: {weight: 0.5}}, {model: b, parameters: {weight: 0.2}}]
parameters: {normalize_weights: false}
""",
    "fusion": "merge_method: arcee_fusion\nbase_model: c\nmodels: [{model: c}, {model: a}]\n",
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_it_runs_and_the_model_is_sound(merge, name):
    from modelwright.core import find
    from modelwright.mergekit.schema import read
    from modelwright.mergekit.table import METHODS

    method = METHODS[read(CONFIGS[name])[0].method].name
    assert method in find.names()
    merged = merge(CONFIGS[name])
    assert outputs(merged.model.module.float()).isfinite().all()


def test_blocks_of_scale_zero_change_nothing(merge, folders):
    merged = merge(CONFIGS["blocks that begin as the identity"])
    assert merged.config["num_hidden_layers"] == 5
    assert (outputs(merged.model.module) - outputs(mw.open(folders["a"]).module)).abs().max() < 1e-5


def test_a_configuration_may_be_a_mapping_or_a_file(merge, folders, tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text(CONFIGS["a soup"], "utf-8")
    one = mw.merge(file, save=tmp_path / "one").folder
    stated = {"merge_method": "passthrough", "models": [{"model": folders["a"]}]}
    assert mw.merge(stated, save=tmp_path / "two").folder.is_dir()
    assert merge(CONFIGS["a soup"]).path.joinpath("model.safetensors").read_bytes() == (one / "model.safetensors").read_bytes()


def test_the_command_line_takes_a_configuration(folders, tmp_path, monkeypatch, capsys):
    from modelwright import cli

    monkeypatch.chdir(folders["a"].parent)
    file = tmp_path / "config.yml"
    file.write_text(CONFIGS["a soup"] + "bogus: 1\n", "utf-8")

    def call(*arguments):
        monkeypatch.setattr("sys.argv", ["modelwright", "merge", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        printed = capsys.readouterr()
        return int(end.value.code or 0), printed.out, printed.err

    code, printed, _ = call(file, tmp_path / "out", "--json", "--quiet", "--as-mergekit")
    assert code == 0
    assert json.loads(printed)["notes"] == ["bogus: left out, as mergekit does; it is no key here."]
    code, _, said = call(file, tmp_path / "out")
    assert code == 2
    assert "exists and is not empty" in said
    code, printed, _ = call(file, tmp_path / "out", "--overwrite")
    assert "note: bogus" in printed
    assert call(file, tmp_path / "out", "another")[0] == 2
    assert call("ties", "a", "--quiet")[0] == 2
    assert call("ties", "a", "b", "--as-mergekit")[0] == 2
    assert call(tmp_path / "nowhere.yaml", tmp_path / "other")[0] == 2


EXPERTS = """
base_model: a
gate_mode: hidden
dtype: bfloat16
experts_per_token: 1
experts:
  - {source_model: mean, positive_prompts: ["write code"], negative_prompts: ["story"]}
  - {source_model: b, positive_prompts: ["tell a story"]}
---
name: mean
merge_method: linear
models: [{model: b, parameters: {weight: 1}}, {model: c, parameters: {weight: 1}}]
"""


def test_a_mixture_of_experts_is_assembled_from_models_and_earlier_documents(merge, read):
    merged = merge(EXPERTS)
    assert merged.config["model_type"] == "mixtral"
    assert merged.dtype("model.norm.weight") == torch.bfloat16
    down = merged.read("model.layers.0.block_sparse_moe.experts.1.w2.weight")
    assert torch.equal(down, read("b", "model.layers.0.mlp.down_proj.weight").bfloat16())
    assert outputs(merged.model.module.float()).isfinite().all()


@pytest.mark.parametrize(("prompts", "gated"), [("", False), (", positive_prompts: [anything]", True)])
@pytest.mark.parametrize("architecture", ["", "architecture: qwen\n"])
def test_a_mixture_may_have_an_expert_that_every_token_goes_to(merge, read, prompts, gated, architecture):
    shared = f"{architecture}shared_experts: [{{source_model: c, residual_scale: 0.5{prompts}}}]\nexperts_per_token: 1"
    merged = merge(EXPERTS.replace("experts_per_token: 1", shared))
    assert (merged.config["model_type"], merged.config["num_experts"]) == ("qwen2_moe", 2)
    down = read("c", "model.layers.0.mlp.down_proj.weight").bfloat16()
    assert torch.equal(merged.read("model.layers.0.mlp.shared_expert.down_proj.weight"), down * (0.5 if gated else 1.0))
    assert bool(merged.read("model.layers.0.mlp.shared_expert_gate.weight").any()) is gated
    assert not merged.read("model.layers.0.self_attn.q_proj.bias").any()
    assert outputs(merged.model.module.float()).isfinite().all()


def test_experts_may_have_noise_and_scales(merge, read):
    merged = merge(EXPERTS.replace("source_model: b", "noise_scale: 0.5, residual_scale: 2, source_model: b"))
    for part, scale in (("w1", 1), ("w2", 2), ("w3", 1)):
        name = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}[part]
        found = merged.read(f"model.layers.0.block_sparse_moe.experts.1.{part}.weight").float() / scale
        assert (found - read("b", f"model.layers.0.mlp.{name}.weight")).std().item() == pytest.approx(0.5, rel=0.05)
        other = merged.read(f"model.layers.0.block_sparse_moe.experts.0.{part}.weight").float()
        assert torch.allclose(other, (read("b", f"model.layers.0.mlp.{name}.weight") + read("c", f"model.layers.0.mlp.{name}.weight")) / 2,
                              atol=1e-2)  # fmt: skip


ROUTER = "model.layers.{}.block_sparse_moe.gate.weight"
TWO = "base_model: a\nexperts:\n  - {source_model: b%s}\n  - {source_model: c%s}\n"
PROMPTS = ', positive_prompts: ["write code"], negative_prompts: ["story"]', ', positive_prompts: ["tell a story"]'


def test_a_mixture_is_the_method_of_a_recipe(merge, folders, tmp_path):
    """Its routers, which say whether prompts, gates and the seed reached the method; two experts for a token by itself."""
    prompted = {"prompts": [["write code"], ["tell a story"]], "against": [["story"], []]}
    for number, (keys, prompts, settings) in enumerate((
        ("", PROMPTS, {"gates": "hidden", **prompted}),
        ("gate_mode: cheap_embed\nexperts_per_token: 1\n", PROMPTS, {"gates": "cheap_embed", "experts_per_token": 1, **prompted}),
        ("gate_mode: random\narchitecture: mixtral\n", ("", ", noise_scale: 0, residual_scale: 1"), {"gates": "random"}),
        ("gate_mode: uniform_random\n", PROMPTS, {"gates": "uniform_random"}),
    )):  # fmt: skip
        merged = merge(keys + TWO % prompts, save=f"theirs-{number}", seed=4)
        save = tmp_path / f"ours-{number}"
        mw.apply(folders["a"], Moe(**settings), donors=[folders["b"], folders["c"]], save=save, seed=4)
        ours = Checkpoint(save)
        assert merged.config["num_experts_per_tok"] == ours.config["num_experts_per_tok"] == settings.get("experts_per_token", 2)
        assert set(merged.names) == set(ours.names)
        for name in merged.names:
            assert torch.equal(merged.read(name), ours.read(name)), name
        said = "reads no prompts; they are left out"
        assert any(said in note for note in merged.notes) == (settings["gates"] == "uniform_random")
    assert torch.allclose(merged.read(ROUTER.format(0)).abs().max(), torch.tensor(1 / 8), rtol=0.1)


@pytest.mark.parametrize("name", ["a", "b"])
def test_the_models_of_a_mixture_are_inputs_too(merge, folders, name):
    with pytest.raises(RecipeError, match="which is never touched"):
        merge(EXPERTS, save=folders[name], overwrite=True)


@pytest.mark.parametrize("wanted", ["base_model: a", "source_model: b"])
def test_nan_in_a_model_of_a_mixture_is_refused_before_anything_is_written(merge, folders, tmp_path, wanted):
    key, name = wanted.split(": ")
    model = mw.open(shutil.copytree(folders[name], tmp_path / "broken"))
    model.module.model.norm.weight.data[0] = torch.nan
    model.save(tmp_path / "broken", overwrite=True)
    with pytest.raises(WeightsError, match="NaN"):
        merge(EXPERTS.replace(wanted, f"{key}: {tmp_path}/broken"))
    assert [path.name for path in tmp_path.iterdir()] == ["broken"]


def test_an_expert_may_have_an_adapter(merge, folders, tmp_path):
    model = mw.apply(folders["b"], Lora(rank=2))
    for name, value in model.module.named_parameters():
        if "lora_B" in name:
            value.data.fill_(0.1)
    model.save(tmp_path / "adapter")
    merged = merge(EXPERTS.replace("source_model: b", f"source_model: b+{tmp_path}/adapter"))
    whole = model.module.merge_and_unload().state_dict()["model.layers.0.mlp.down_proj.weight"]
    assert torch.equal(merged.read("model.layers.0.block_sparse_moe.experts.1.w2.weight"), whole.bfloat16())


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        (("gate_mode: hidden", "gate_mode: hiden"), "Did you mean 'hidden'?"),
        (("experts_per_token: 1", "shared_experts: [1]"), "shared_experts.0 must be a mapping with `source_model:`"),
        (("experts_per_token: 1", "shared_experts: [{source_model: a}, {source_model: b}]"), "have one such expert at most"),
        (("experts_per_token: 1", "architecture: qwen"), "it is a llama, without a shared expert, and qwen3 is asked for"),
        (("experts_per_token: 1", "architecture: phi"), "architecture: phi with 0 shared experts is not here. There are mixtral (none)"),
        (("experts_per_token: 1", "experts_per_token: 3"), "3 experts per token, of 2 donors"),
        (("experts_per_token: 1", "architecture: deepseek"), "transformers does not have. Leave it out"),
        (
            ("experts_per_token: 1", "shared_experts: [{source_model: a}]\narchitecture: mixtral"),
            "mixtral with 1 shared experts is not here",
        ),
        (("source_model: b", "source_modl: b"), "experts.1.source_model must be a model"),
        (('positive_prompts: ["tell', 'positive_prompt: ["tell'), "experts.1.positive_prompt is no key here. Did you mean"),
        (("source_model: b", "noise_scale: some, source_model: b"), "experts.1.noise_scale must be a number; got 'some'"),
        (('["tell a story"]', "tell"), "experts.1.positive_prompts must be a list of texts, such as [write code]; got 'tell'"),
        (('["story"]', "[1]"), "experts.0.negative_prompts must be a list of texts, such as [write code]; got [1]"),
        (("experts_per_token: 1", "experts_per_token: 0"), "experts_per_token must be a whole number of at least 1; got 0"),
        (("source_model: b", "noise_scale: -1, source_model: b"), "noise_each are numbers of at least 0"),
        (("base_model: a", "base_model: a\nname: mixed"), "one has no `name`"),
        (("bfloat16", "float8"), "dtype is one of"),
        (('  - {source_model: b, positive_prompts: ["tell a story"]}\n', ""), "experts must be a list of two or more entries"),
        (("---\nname: mean", "---\nexperts: []\nbase_model: a\nname: more\n---\nname: mean"), "is the final document"),
    ],
)
def test_what_a_mixture_cannot_be_is_said(merge, tmp_path, change, wanted):
    with pytest.raises(ModelwrightError) as error:
        merge(EXPERTS.replace(*change))
    assert wanted in str(error.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("base", ["a", "mean", "wide"])
@pytest.mark.parametrize(("change", "wanted"), [
    ({"experts_per_token: 1": "experts_per_token: 3"}, "3 experts per token, of 2 donors"),
    ({"source_model: b": "source_model: wide"}, "other shapes, first model.layers.0.mlp"),
])  # fmt: skip
def test_what_a_mixture_of_earlier_documents_cannot_be_is_said_before_they_are_merged(
    merge, folders, tmp_path, monkeypatch, change, wanted, base
):
    wide = Model(name="wide", module=tiny("llama", seed=4, intermediate_size=96), tokenizer=letters()).save(tmp_path / "models" / "wide")
    begun, text = [], EXPERTS.replace("base_model: a", f"base_model: {base}")
    monkeypatch.setattr(Writer, "__init__", lambda *_, **__: begun.append("a folder"))
    for old, new in change.items():
        text = text.replace(old, new)
    with pytest.raises(ModelwrightError, match=wanted):
        merge(text.replace(": wide", f": {wide}"))
    assert not begun

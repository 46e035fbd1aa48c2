"""Every recipe of the repository runs from end to end, short and on a small model."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import pytest
import standin
import torch
from peft import PeftModel
from safetensors import safe_open

from modelwright import compare, small
from modelwright.blocks.levels import LevelsLinear
from modelwright.core import data, find, labels, plan, recipe, walk
from modelwright.core.errors import NeedError
from modelwright.core.given import Given
from modelwright.core.method import AdapterMethod
from modelwright.core.model import open
from modelwright.methods.quantize.dequantize import Dequantize

FOLDER = Path(__file__).parents[2] / "recipes"
SHORT = ["samples=4", "length=64"]
NEW = ["hidden_size=64", "intermediate_size=96", "num_hidden_layers=2", "num_attention_heads=2", "num_key_value_heads=1"]
OVERRIDES = {  # what makes each recipe short
    "starter": [*(f"model.config.{text}" for text in NEW), "model.tokenizer.vocabulary=300",
                "steps.0.tokens=2048", "steps.0.batch=4", "steps.0.length=32", "steps.0.accumulation=2"],
    "prune-and-recover": [*SHORT, "steps.2.tokens=2048", "steps.2.length=64"],
    "quantize": SHORT,
    "merge-ties": [],
    "lora": ["steps.1.tokens=2048", "steps.1.length=64"],
    "qlora": ["steps.0.group=32", "steps.1.rank=4", "steps.2.tokens=2048", "steps.2.length=64", "steps.2.learning_rate=0.01"],
    "sparse-pretrain": ["steps.0.tokens=2048", "steps.0.length=64"],
    "pretrain-tune-merge": ["steps.0.tokens=2048", "steps.0.length=64", "steps.1.tokens=1024", "steps.1.length=64"],
    "expert": ["steps.0.tokens=2048", "steps.0.length=64"],
}  # fmt: skip


def made(name: str, tmp_path: Path, model: Path, *more: str) -> recipe.Recipe:
    """A recipe of the repository, made short."""
    overrides = [*OVERRIDES[name], f"save={tmp_path / 'out'}", *more]
    if name != "starter":
        overrides.insert(0, f"model={model}")
    if name == "merge-ties":
        donors = [standin.write(tmp_path / f"donor-{seed}", seed=seed) for seed in (1, 2)]
        overrides.append(f"steps.0.donors=[{', '.join(map(str, donors))}]")
    else:
        text = tmp_path / "text.txt"
        text.write_text("\n\n".join(standin.documents()[0]), "utf-8")
        overrides.insert(0, f"data={text}")
    return recipe.read(FOLDER / f"{name}.yaml", overrides)


COMPARISONS = {  # what makes each comparison short
    "compare-adapters": ["tokens=1024", "compare=[adapt.lora, adapt.ssf]"],
    "classify": ["tokens=4096", "compare=[adapt.lora]", "tasks.topics.examples=[24, 96]"],
}


def test_every_recipe_is_run_here():
    assert {path.stem for path in FOLDER.glob("*.yaml")} == {*OVERRIDES, *COMPARISONS}


@pytest.mark.parametrize("name", COMPARISONS)
def test_a_comparison_runs_and_every_adapter_has_a_row_for_each_task(name, tmp_path, stand_in, monkeypatch):
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(standin.documents()[0]), "utf-8")
    passages = tuple(f"{number % 12} {text.read_text()[number : number + 50]}" for number in range(240))
    monkeypatch.setattr(labels, "topics", lambda: labels.Labelled("topics", torch.arange(240) % 12, 12, texts=passages))
    monkeypatch.setattr(data, "corpus", lambda: data.read(text))
    monkeypatch.setattr(small, "encoder", functools.partial(small.encoder, steps=5))
    monkeypatch.setattr(small, "vit", functools.partial(small.vit, 5))
    stated = recipe.parse(FOLDER / f"{name}.yaml")
    known = [find.find(one) for one in stated["compare"]]
    for change in [*COMPARISONS[name], f"save={tmp_path / 'out'}", "seeds=[0]", "rates=[0.01]", "length=64"]:
        recipe.override(stated, change)
    if "code" in stated["tasks"]:
        stated["tasks"]["code"] = {"model": str(stand_in), "data": str(text)}
    rows = compare.compare(stated)
    assert all(issubclass(cls, AdapterMethod) for cls in known)
    assert len(rows) == 4 * 3 if name == "compare-adapters" else 3 * 2
    assert {row["task"] for row in rows} == ({"code", "topics", "stripes"} if "code" in stated["tasks"] else {
        "topics, 24 examples", "topics, 96 examples"})  # fmt: skip
    assert all(row["score"] > 0 for row in rows if row["method"] != "adapt.ssf")
    assert "<svg" in (tmp_path / "out" / "comparison.svg").read_text()


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.stem)
def test_its_first_line_says_what_it_is_for(path):
    assert path.read_text("utf-8").startswith("# ")


@pytest.mark.parametrize("name", OVERRIDES)
def test_it_runs_and_the_result_loads(name, tmp_path, stand_in):
    short = made(name, tmp_path, stand_in)
    planned = plan.plan(short)
    done = recipe.run(short)
    assert [row["step"] for row in done.account] == [row.step for row in planned.rows]
    assert [row["parameters"] for row in done.account] == [row.parameters for row in planned.rows]
    assert [row["bytes_memory"] for row in done.account] == [row.bytes for row in planned.rows]
    again = open(tmp_path / "out")
    ids = torch.arange(8)[None]
    with torch.no_grad():
        assert torch.equal(again.module(input_ids=ids).logits, done.model.module(input_ids=ids).logits)
    assert again.tokenizer.decode(again.tokenizer.encode("The text.")) == "The text."
    assert recipe.read(tmp_path / "out" / "recipe.yaml") == short
    assert not (tmp_path / "out.steps").exists()


def test_quantize_writes_compressed_tensors_with_packed_blocks(tmp_path, stand_in):
    done = recipe.run(made("quantize", tmp_path, stand_in))
    stated = json.loads((tmp_path / "out" / "config.json").read_text("utf-8"))["quantization_config"]
    assert stated["quant_method"] == "compressed-tensors"
    assert done.account[-1]["bytes_disk"] < 0.5 * done.account[0]["bytes_disk"]


def test_merge_ties_with_scale_zero_gives_the_base(tmp_path, stand_in):
    short = made("merge-ties", tmp_path, stand_in, "steps.0.scale=0")
    done = recipe.run(short)
    with safe_open(stand_in / "model.safetensors", "pt") as before, safe_open(done.model.folder / "model.safetensors", "pt") as after:
        assert set(before.keys()) == set(after.keys())
        assert all(torch.equal(before.get_tensor(name), after.get_tensor(name)) for name in before.keys())  # noqa: SIM118


def test_lora_folds_into_a_model_without_adapters(tmp_path, stand_in):
    done = recipe.run(made("lora", tmp_path, stand_in))
    assert "adapters" not in done.model.marks
    assert done.account[0]["parameters"] == done.account[-1]["parameters"] < done.account[1]["parameters"]


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft's, in from_pretrained
def test_qlora_ends_with_an_adapter_beside_packed_weights_that_plain_peft_reads(tmp_path, stand_in):
    done = recipe.run(made("qlora", tmp_path, stand_in))
    assert done.model.marks == {"packed", "adapters"}
    packed = [layer for layer in done.model.module.modules() if isinstance(layer, LevelsLinear)]
    assert len(packed) == 7 * standin.CONFIG["num_hidden_layers"]
    assert {(layer.levels, layer.scales) for layer in packed} == {("nf4", "nested")}
    assert done.account[1]["bytes_disk"] < 0.5 * done.account[0]["bytes_disk"]
    base = walk.change(open(tmp_path / "out" / "base"), Dequantize(), Given()).module
    ids = torch.arange(8)[None]
    with torch.no_grad():
        before = base(input_ids=ids).logits
        found = PeftModel.from_pretrained(base, str(tmp_path / "out")).eval()(input_ids=ids).logits
        assert torch.allclose(found, done.model.module(input_ids=ids).logits, atol=1e-4)
    assert not torch.allclose(found, before, atol=1e-3)


def test_prune_and_recover_removes_a_block_and_ends_packed(tmp_path, stand_in):
    done = recipe.run(made("prune-and-recover", tmp_path, stand_in))
    assert len(done.model.module.model.layers) == standin.CONFIG["num_hidden_layers"] - 1
    assert done.model.marks >= {"packed"}
    assert [step["method"] for step in done.model.history] == [
        "prune.shortgpt", "prune.sparsegpt", "distill.recover", "quantize.gptq",
    ]  # fmt: skip


def test_without_text_a_recipe_says_what_is_missing(tmp_path, stand_in):
    with pytest.raises(NeedError, match=r"step 0: quantize\.gptq needs calibration text"):
        recipe.run(made("quantize", tmp_path, stand_in, "data=null"))

"""What all formats have in common: where they write, what they refuse, and that opened models are models as any other."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from tiny import outputs, tiny
from torch import nn
from transformers import AutoModelForCausalLM

import modelwright as mw
from modelwright.anatomy.removal import remove_units
from modelwright.core.errors import ModelError, RecipeError
from modelwright.core.model import Model
from modelwright.core.plan import plan
from modelwright.core.recipe import Recipe, Step
from modelwright.methods.adapt.lora import Lora
from modelwright.methods.factor.svd import Svd
from modelwright.methods.prune.wanda import Wanda
from modelwright.methods.quantize.dequantize import Dequantize
from modelwright.methods.quantize.llm_int8 import LlmInt8
from modelwright.methods.quantize.nf4 import Nf4
from modelwright.methods.quantize.rtn import Rtn
from modelwright.methods.share.depth import Depth


def test_a_folder_on_disk_can_be_written_and_stays_as_it_is(quantised, tmp_path):
    quantised(Rtn(group=32)).save(tmp_path / "in")
    before = {file.name: file.read_bytes() for file in (tmp_path / "in").iterdir()}
    mw.export(tmp_path / "in", tmp_path / "out", "awq")
    assert {file.name: file.read_bytes() for file in (tmp_path / "in").iterdir()} == before
    assert json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["quant_method"] == "awq"
    with pytest.raises(RecipeError, match="exists and is not empty"):
        mw.export(tmp_path / "in", tmp_path / "out", "gptq")
    mw.export(tmp_path / "in", tmp_path / "out", "gptq", overwrite=True)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["quant_method"] == "gptq"
    with pytest.raises(RecipeError, match="never touched"):
        mw.export(tmp_path / "in", tmp_path / "in", "awq", overwrite=True)


def test_from_format_to_format_by_way_of_folders(quantised, tmp_path):
    model = quantised(Rtn(group=32, symmetric=False))
    mw.export(model, tmp_path / "awq", "awq")
    mw.export(tmp_path / "awq", tmp_path / "gptq", "gptq_v2")
    mw.open(tmp_path / "gptq").save(tmp_path / "ours")
    back = mw.open(tmp_path / "ours").module
    for name, layer in model.module.named_modules():
        if hasattr(layer, "dense"):
            assert torch.equal(back.get_submodule(name).dense(), layer.dense()), name


@pytest.mark.parametrize(("form", "method"), [("gptq", Rtn(group=32)), ("bitsandbytes", Nf4())], ids=str)
def test_an_opened_folder_is_planned_run_and_measured_as_any_model(form, method, quantised, text, tmp_path):
    model = quantised(method)
    mw.export(model, tmp_path / "theirs", form)
    opened = mw.open(tmp_path / "theirs")
    assert opened.sources == [tmp_path / "theirs"]
    assert outputs(opened.module).isfinite().all()
    recipe = Recipe(model=str(tmp_path / "theirs"), data=str(text), samples=4, length=32,
                    steps=(Step(Dequantize()), Step(Wanda(sparsity=0.5))), save=str(tmp_path / "out"))  # fmt: skip
    rows = plan(recipe).rows
    assert rows[0].bytes < rows[1].bytes
    mw.run(recipe)
    done = mw.open(tmp_path / "out")
    assert done.marks == {"float", "sparse"}
    weight = done.module.model.layers[0].mlp.up_proj.weight
    assert (weight == 0).float().mean() == pytest.approx(0.5, abs=0.01)
    kept = weight != 0
    assert torch.equal(weight[kept], model.module.model.layers[0].mlp.up_proj.dense()[kept])


def uneven():
    module = tiny("llama")
    remove_units(module, "mlp", {1: range(128)}, plain=False)
    return Model(name="x", module=module)


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (lambda: tiny("llama"), "has no layer that is stored in fewer bits"),
        (lambda: nn.Sequential(nn.Linear(32, 32)), "models of transformers without an adapter"),
        (lambda: mw.apply(Model(name="x", module=tiny("llama")), Svd(rank=8)), "q_proj, which (is|has) a LowRankLinear"),
        (lambda: mw.apply(Model(name="x", module=tiny("gpt2")), Rtn(group=32)), "in the place of Conv1D"),
        (lambda: mw.apply(Model(name="x", module=tiny("qwen3_moe")), Rtn(group=32)), "which holds experts one by one"),
        (lambda: mw.apply(mw.apply(Model(name="x", module=tiny("llama")), Depth(loops=2)), Rtn(group=32)), "blocks share weights"),
        (lambda: mw.apply(Model(name="x", module=tiny("llama")), Lora(rank=2)), "without an adapter"),
    ],
    ids=["dense", "no transformers", "factors", "Conv1D", "experts", "shared", "adapter"],
)
@pytest.mark.parametrize("form", ["gptq", "awq", "bitsandbytes"])
def test_models_that_no_folder_can_hold_are_refused_by_name(made, words, form, tmp_path):
    with pytest.raises(ModelError, match=words):
        mw.export(made(), tmp_path / "out", form)
    assert not (tmp_path / "out").exists()


def with_head(method):
    return mw.apply(mw.open(tiny("llama", vocab_size=96)), dataclasses.replace(method, where=("attn", "mlp", "head")))


@pytest.mark.parametrize("method", [Nf4(), LlmInt8()], ids=str)
def test_a_head_in_few_bits_is_read_by_plain_transformers(method, tmp_path):
    pytest.importorskip("bitsandbytes")
    model = with_head(method)
    mw.export(model, tmp_path / "out", "bitsandbytes")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", device_map="cpu")
    assert type(loaded.lm_head).__name__ in ("Linear4bit", "Linear8bitLt")
    assert torch.equal(outputs(mw.open(tmp_path / "out").module), outputs(model.module))


def test_a_head_that_readers_take_for_dense_is_refused(tmp_path):
    with pytest.raises(ModelError, match="AWQ cannot hold 1 layers, first lm_head, which gives the logits"):
        mw.export(with_head(Rtn(group=32)), tmp_path / "out", "awq")


def test_the_name_of_the_head_is_the_architectures(tmp_path):
    mw.export(mw.apply(mw.open(tiny("gpt_neox")), Rtn(group=32)), tmp_path / "out", "gptq")
    stated = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert stated["lm_head"] is False
    assert "dynamic" not in stated


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda stated: stated.update(transform_config={"config_groups": {"R1": {}}}), "transform_config"),
        (lambda stated: stated.update(sparsity_config={"format": "sparse-bitmask"}), "sparsity_config"),
        (lambda stated: stated.update(kv_cache_scheme={"num_bits": 8}), "kv_cache_scheme"),
        (lambda stated: stated["config_groups"]["group_0"].update(output_activations={"num_bits": 4}), "output_activations"),
        (lambda stated: stated["config_groups"]["group_0"]["weights"].update(actorder="group"), "actorder"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_a_folder_of_compressed_tensors_says_beyond_our_layers_is_refused(change, what, quantised, tmp_path):
    quantised(Rtn(group=32)).save(tmp_path / "in")
    config = json.loads((tmp_path / "in" / "config.json").read_text())
    change(config["quantization_config"])
    (tmp_path / "in" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=f"A compressed-tensors checkpoint with {what} cannot be opened yet"):
        _ = mw.open(tmp_path / "in").module


def test_other_quantised_folders_are_refused_as_before(small, tmp_path):
    folder = tmp_path / "hqq"
    mw.open(small).save(folder)
    config = json.loads((folder / "config.json").read_text()) | {"quantization_config": {"quant_method": "hqq"}}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="A checkpoint in the hqq format cannot be opened yet"):
        _ = mw.open(folder).module


@pytest.mark.parametrize(("form", "method"), [("gptq", Rtn(group=32)), ("awq", Rtn(group=32)), ("bitsandbytes", Nf4(group=32))], ids=str)
def test_other_sizes_than_the_config_says_are_refused(form, method, tmp_path):
    with pytest.raises(ModelError, match=r"3 tensors, first model\.layers\.1\.mlp\.gate_proj\.weight, are not there, or of other sizes"):
        mw.export(mw.apply(uneven(), method), tmp_path / "out", form)


def test_other_sizes_are_refused_in_gguf_too(tmp_path):
    pytest.importorskip("gguf")
    with pytest.raises(ModelError, match="1.mlp.gate_proj is another part than the architecture has"):
        mw.export(uneven(), tmp_path / "out", "gguf-q8_0")
    with pytest.raises(ModelError, match="3 tensors, .*of other sizes than the config says"):
        mw.export(mw.apply(uneven(), Rtn(group=32)), tmp_path / "out", "gguf-q8_0")

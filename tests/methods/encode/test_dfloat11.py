import copy
import os
import re
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import outputs, tiny, tiny_inputs

import modelwright as mw
from modelwright.blocks.coded import CodedLinear
from modelwright.blocks.coded_embedding import CodedEmbedding
from modelwright.core.model import Model
from modelwright.maths.coded_floats import least_bytes
from modelwright.methods.encode.dfloat11 import Dfloat11

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
LOAD = """
import sys, torch
import modelwright
from transformers import AutoModelForCausalLM
from safetensors.torch import load_file, save_file
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="auto").eval()
with torch.no_grad():
    save_file({"logits": model(**load_file(sys.argv[1] + "/inputs.safetensors")).logits}, sys.argv[1] + "/found")
"""


def saved(kind, folder, dtype=torch.bfloat16, **config):
    Model(name=kind, module=tiny(kind, **config).to(dtype)).save(folder)
    return folder


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("kind", "config"), [("llama", {}), ("llama", {"tie_word_embeddings": True}), ("gpt2", {})])
def test_logits_are_the_same_bits_in_memory_streamed_and_loaded(kind, config, dtype, tmp_path):
    folder = saved(kind, tmp_path / "in", dtype, **config)
    module = mw.open(folder).module
    before = outputs(module)
    assert torch.equal(outputs(mw.apply(module, Dfloat11())), before)
    mw.apply(str(folder), Dfloat11(), save=tmp_path / "out")
    again = mw.open(tmp_path / "out")
    assert torch.equal(outputs(again.module), before)
    assert "packed" in again.marks
    assert "float" not in again.marks
    again.save(tmp_path / "again")
    assert torch.equal(outputs(mw.open(tmp_path / "again").module), before)


def test_from_pretrained_gives_the_same_logits_in_another_process(tmp_path):
    folder = saved("llama", tmp_path / "in", tie_word_embeddings=True)
    before = outputs(mw.open(folder).module)
    mw.apply(str(folder), Dfloat11(), save=tmp_path / "out")
    save_file(tiny_inputs(tiny()), tmp_path / "out" / "inputs.safetensors")
    done = subprocess.run([sys.executable, "-c", LOAD, tmp_path / "out"], env=os.environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert torch.equal(load_file(tmp_path / "out" / "found")["logits"], before)


def test_linears_embedding_and_head_are_coded_and_norms_are_not():
    module = mw.apply(tiny(), Dfloat11())
    coded = {name for name, layer in module.named_modules() if isinstance(layer, CodedLinear)}
    assert isinstance(module.model.embed_tokens, CodedEmbedding)
    assert {"lm_head", "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"} <= coded
    assert {name.rpartition(".")[0].rpartition(".")[2] for name, _ in module.named_parameters()} == {
        "input_layernorm", "post_attention_layernorm", "norm",
    }  # fmt: skip


def test_a_tied_head_is_coded_once_and_stays_tied(tmp_path):
    folder = saved("llama", tmp_path / "in", tie_word_embeddings=True)
    mw.apply(str(folder), Dfloat11(), save=tmp_path / "out")
    names = load_file(tmp_path / "out" / "model.safetensors")
    assert "model.embed_tokens.weight_codes" in names
    assert not [name for name in names if name.startswith("lm_head")]
    loaded = mw.open(tmp_path / "out").module
    assert loaded.config.tie_word_embeddings
    for module in (loaded, mw.apply(tiny(tie_word_embeddings=True).bfloat16(), Dfloat11())):
        assert isinstance(module.lm_head, CodedLinear)
        for name, value in module.model.embed_tokens.named_buffers():
            assert dict(module.lm_head.named_buffers())[name] is value


def test_where_and_skip_choose():
    module = mw.apply(tiny(), Dfloat11(where="mlp", skip="blocks 1-3"))
    coded = {name for name, layer in module.named_modules() if isinstance(layer, CodedLinear)}
    assert coded == {f"model.layers.0.mlp.{name}_proj" for name in ("gate", "up", "down")}


def test_bits_for_each_weight_are_told_beside_the_entropy():
    before = mw.open(tiny().bfloat16())
    matrices = {name: value.clone() for name, value in before.module.named_parameters() if value.ndim == 2}
    model = mw.apply(before, Dfloat11())
    (note,) = model.history[-1]["notes"]
    count = sum(value.numel() for value in matrices.values())
    stored = sum(layer.stored_bytes() for layer in model.module.modules() if isinstance(layer, (CodedLinear, CodedEmbedding)))
    least = sum(least_bytes(value) for value in matrices.values())
    found = re.fullmatch(r"encode.dfloat11: ([\d,]+) weights take ([\d.]+) bits each; the entropy .* leaves ([\d.]+) at least", note)
    assert found[1] == f"{count:,}"
    assert float(found[2]) == pytest.approx(8 * stored / count, abs=1e-3)
    assert float(found[3]) == pytest.approx(8 * least / count, abs=1e-3)
    assert least < stored


def test_what_it_does_not_code_is_named():
    module = tiny()
    module.lm_head.double()
    notes = mw.apply(mw.open(module), Dfloat11()).history[-1]["notes"]
    assert any("left a tensor of float64" in note for note in notes)
    assert type(module.lm_head).__name__ == "Linear"
    convolutions = mw.apply(mw.open(tiny("vit")), Dfloat11()).history[-1]["notes"]
    assert any("shape [64, 3, 4, 4] as it is" in note for note in convolutions)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_outputs_and_gradients_are_those_of_the_dense_layer_while_others_train(kind):
    dense = tiny(kind).bfloat16()
    coded = mw.apply(copy.deepcopy(dense), Dfloat11())
    ids = tiny_inputs(dense)["input_ids"][:1]
    found = []
    for module in (dense, coded):
        inputs = module.get_input_embeddings()(ids).detach().requires_grad_()
        logits = module(inputs_embeds=inputs).logits
        logits.float().square().sum().backward()
        found.append((logits.detach(), inputs.grad))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.allclose(found[0][1].float(), found[1][1].float(), rtol=0.05, atol=0.05 * float(found[0][1].abs().max()))

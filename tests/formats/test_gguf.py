"""GGUF files: what lies in them, by the gguf package; what plain transformers makes of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny import tiny

import modelwright as mw
from modelwright.core.errors import ModelError, SettingError
from modelwright.core.model import Model
from modelwright.formats.gguf import cut_of, form_of, interleaved
from modelwright.maths import gguf_blocks
from modelwright.methods.factor.svd import Svd
from modelwright.methods.prune.blockpruner import BlockPruner
from modelwright.methods.quantize.nf4 import Nf4
from modelwright.methods.quantize.rtn import Rtn

gguf = pytest.importorskip("gguf")
SIZES = {"hidden_size": 256, "intermediate_size": 512}


def write(module, folder, form):
    mw.export(module, folder, form)
    return {tensor.name: tensor for tensor in gguf.GGUFReader(folder / "model.gguf").tensors}


def load(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, gguf_file="model.gguf", dtype=torch.float32)


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3"])
def test_plain_transformers_reads_the_same_weights_and_computes_the_same(kind, tmp_path):
    module = tiny(kind, **SIZES, **({"head_dim": 128} if kind == "qwen3" else {}))  # the only one that transformers reads of Qwen3
    write(module, tmp_path / "out", "gguf-f32")
    loaded = load(tmp_path / "out")
    before, after = module.state_dict(), loaded.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    ids = torch.arange(1, 25).view(2, 12)
    assert torch.allclose(module(ids).logits, loaded(ids).logits, atol=1e-5)


@pytest.mark.parametrize(
    ("form", "allowed"),
    [
        ("gguf-bf16", 2**-8),
        ("gguf-f16", 2**-11),
        ("gguf-q8_0", 1 / 254 + 2**-11),
        ("gguf-q6_k", 1 / 32),
        ("gguf-q4_0", 1 / 8),
        ("gguf-q4_k_m", 1 / 10),
    ],
)
def test_weights_come_back_within_what_a_form_can_hold(form, allowed, tmp_path):
    module = tiny("llama", **SIZES)
    write(module, tmp_path / "out", form)
    after = load(tmp_path / "out").state_dict()
    for name, value in module.state_dict().items():
        most = 0 if value.ndim < 2 else allowed * value.abs().max()
        assert (after[name] - value).abs().max() <= most, name


def test_matrices_are_the_blocks_of_their_dense_weights_with_heads_interleaved(tmp_path):
    module = tiny("llama", **SIZES)
    found = write(module, tmp_path / "out", "gguf-q4_k_m")
    up, q = module.model.layers[1].mlp.up_proj.weight, module.model.layers[1].self_attn.q_proj.weight
    assert np.array_equal(found["blk.1.ffn_up.weight"].data, gguf_blocks.encode(up, "Q4_K").numpy())
    assert np.array_equal(found["blk.1.attn_q.weight"].data, gguf_blocks.encode(interleaved(q, 8), "Q4_K").numpy())
    assert found["blk.1.ffn_down.weight"].shape.tolist() == [512, 256]  # the other way round


def test_q6_k_is_the_blocks_that_the_gguf_package_reads(tmp_path):
    module = tiny("llama", **SIZES)
    found = write(module, tmp_path / "out", "gguf-q6_k")
    assert {tensor.tensor_type.name for name, tensor in found.items() if "norm" not in name} == {"Q6_K"}
    down = gguf_blocks.encode(module.model.layers[1].mlp.down_proj.weight, "Q6_K")
    assert found["blk.1.ffn_down.weight"].data.tobytes() == down.numpy().tobytes()
    assert found["blk.1.ffn_down.weight"].data.shape == (256, 512 // 256 * 210)


def test_interleaving_by_hand():
    assert interleaved(torch.arange(8)[:, None], 2)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_the_preset_q4_k_m_has_more_bits_where_it_matters(tmp_path):
    kinds = {name: tensor.tensor_type.name for name, tensor in write(tiny("llama", **SIZES), tmp_path / "out", "gguf-q4_k_m").items()}
    six = {name for name, kind in kinds.items() if kind == "Q6_K"}
    assert six == {"output.weight", *(f"blk.{block}.{part}.weight" for block in (2, 3) for part in ("attn_v", "ffn_down"))}
    assert {kinds[name] for name in kinds if "norm" in name} == {"F32"}
    assert all(kind == "Q4_K" for name, kind in kinds.items() if name not in six and "norm" not in name)


def test_forms_of_a_deep_model_and_of_rows_that_blocks_do_not_divide():
    often = [number for number in range(32) if form_of(f"blk.{number}.attn_v.weight", (256, 512), "q4_k_m", 32) == "Q6_K"]
    assert often == [0, 1, 2, 3, 6, 9, 12, 15, 18, 21, 24, 27, 28, 29, 30, 31]
    assert form_of("blk.1.ffn_up.weight", (8, 160), "q4_k_m", 4) == "Q5_0"
    assert form_of("output.weight", (8, 160), "q4_k_m", 4) == "Q8_0"
    assert form_of("blk.1.ffn_up.weight", (8, 72), "q4_k_m", 4) == "F16"
    assert form_of("blk.1.ffn_up.weight", (8, 72), "q8_0", 4) == "F16"
    assert form_of("output.weight", (8, 512), "q4_0", 4) == "Q6_K"
    assert form_of("blk.1.ffn_up.weight", (8, 512), "q6_k", 4) == form_of("output.weight", (8, 512), "q6_k", 4) == "Q6_K"
    assert form_of("token_embd.weight", (8, 160), "q6_k", 4) == "Q8_0"
    assert form_of("blk.1.attn_norm.weight", (512,), "q4_0", 4) == "F32"


def test_a_tied_embedding_is_written_once_as_the_head_it_is(tmp_path):
    module = tiny("llama", **SIZES, tie_word_embeddings=True)
    found = write(module, tmp_path / "out", "gguf-q4_k_m")
    assert "output.weight" not in found
    assert found["token_embd.weight"].tensor_type.name == "Q6_K"
    assert load(tmp_path / "out").config.tie_word_embeddings


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
@pytest.mark.parametrize("method", [Nf4(), Rtn(group=32, where=["attn", "embed"]), Svd(rank=8)], ids=str)
def test_stored_layers_are_made_dense(method, kind, tmp_path):
    model = mw.apply(Model(name="x", module=tiny(kind)), method)
    write(model, tmp_path / "out", "gguf-f32")
    loaded = load(tmp_path / "out")
    own = model.module.get_submodule("model.layers.1.self_attn.q_proj").dense()
    assert torch.equal(loaded.model.layers[1].self_attn.q_proj.weight, own)
    ids = torch.arange(1, 25).view(2, 12)
    assert torch.allclose(loaded(ids).logits, model.module(ids).logits, atol=1e-3)


def test_the_starter_model_comes_with_its_tokenizer(tmp_path):
    from transformers import AutoTokenizer

    mw.export("starter", tmp_path / "out", "gguf-q8_0")
    fields = gguf.GGUFReader(tmp_path / "out" / "model.gguf").fields
    assert fields["tokenizer.ggml.pre"].contents() == "gpt-2"
    assert fields["tokenizer.ggml.eos_token_id"].contents() == 0
    assert fields["tokenizer.ggml.token_type"].contents()[0] == gguf.TokenType.CONTROL
    assert len(fields["tokenizer.ggml.tokens"].contents()) == 2048
    own = mw.open("starter").tokenizer
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out", gguf_file="model.gguf")
    text = "def f(x):\n    return x + 1  # it's 2026, don't\t\n\nünïcode"
    assert theirs(text).input_ids == own(text).input_ids


def test_a_tokenizer_without_a_form_is_left_out_and_that_is_said(small, tmp_path, capsys):
    mw.export(small, tmp_path / "out", "gguf-q8_0")
    said = " ".join(capsys.readouterr().err.split())
    assert "note: the tokenizer is not in model.gguf, for only pairs of bytes" in said
    assert not [name for name in gguf.GGUFReader(tmp_path / "out" / "model.gguf").fields if name.startswith("tokenizer")]
    assert (tmp_path / "out" / "tokenizer.json").is_file()


def test_ways_of_cutting_text_by_their_names():
    whole = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
    after = whole | {"use_regex": False}
    digits = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    split = {"type": "Split", "pattern": {"Regex": digits}}
    assert cut_of(whole) == "gpt-2"
    assert cut_of({"type": "Sequence", "pretokenizers": [split, after]}) == "qwen2"
    assert cut_of({"type": "Sequence", "pretokenizers": [{"type": "Split", "pattern": {"Regex": "."}}, after]}) is None
    assert cut_of({"type": "Metaspace"}) is None
    assert cut_of(whole | {"add_prefix_space": True}) is None


@pytest.mark.parametrize(
    ("kind", "config", "words"),
    [
        ("gpt2", {}, "is a gpt2; GGUF is written here of llama, mistral, qwen2, qwen3"),
        ("llama", {"hidden_act": "gelu"}, "the activation is gelu"),
        ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, "positions are rotated as linear"),
    ],
    ids=str,
)
def test_other_models_are_refused_before_anything_is_written(kind, config, words, tmp_path):
    with pytest.raises(ModelError, match=words):
        mw.export(tiny(kind, **config), tmp_path / "out", "gguf-q8_0")
    assert not (tmp_path / "out").exists()


def test_values_that_float16_cannot_hold_and_removed_parts_are_refused(tmp_path):
    module = tiny("llama")
    module.model.layers[0].mlp.up_proj.weight.data[0, 0] = 1e5
    with pytest.raises(ModelError, match=r"layers\.0\.mlp\.up_proj\.weight holds values that float16 cannot"):
        mw.export(module, tmp_path / "out", "gguf-f16")
    mw.export(module, tmp_path / "out", "gguf-bf16")
    module.model.layers[0].mlp.up_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(ModelError, match=r"layers\.0\.mlp\.up_proj\.weight holds values that are NaN or infinite"):
        mw.export(module, tmp_path / "nan", "gguf-bf16")
    module.model.layers[0].mlp.up_proj.weight.data.fill_(1e-6)
    with pytest.raises(
        ModelError, match=r"up_proj\.weight holds values that are too small for the float16 scales of Q8_0, at most 1.0e-06"
    ):
        mw.export(module, tmp_path / "small", "gguf-q8_0")
    data = [{"input_ids": torch.arange(1, 33).view(2, 16), "attention_mask": torch.ones(2, 16, dtype=torch.long)}]
    cut = mw.apply(tiny("llama"), BlockPruner(branches=1), data=data)
    with pytest.raises(ModelError, match="another part than the architecture has"):
        mw.export(cut, tmp_path / "cut", "gguf-f16")


def test_unknown_forms_are_refused():
    with pytest.raises(SettingError, match=r"form is one of gptq, .*; got 'gguf-q4_k'"):
        mw.export("starter", "nowhere", "gguf-q4_k")

"""GGUF files as models: every value that the gguf package makes of their blocks, in its place, and nothing of other files."""

from __future__ import annotations

import shutil

import pytest
import torch
from tiny import tiny

import modelwright as mw
from modelwright.core.errors import ModelError, WeightsError
from modelwright.core.plan import plan
from modelwright.core.recipe import Recipe, Step
from modelwright.formats.gguf import halved, interleaved
from modelwright.maths import gguf_blocks, slices
from modelwright.methods.prune.magnitude import Magnitude

gguf = pytest.importorskip("gguf")
SIZES = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2}
IDS = torch.arange(1, 25).view(2, 12)
LLAMA_3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 1e4,
           "original_max_position_embeddings": 8192}  # fmt: skip


def written(module, folder, form="gguf-f32"):
    mw.export(module, folder, form)
    return folder / "model.gguf"


def changed(file, to, entries=(), tensors=()):
    """A copy of a file with other entries and tensors (form, bytes) by name; None takes one away."""
    entries, tensors = dict(entries), dict(tensors)
    reader = gguf.GGUFReader(file)
    out = gguf.GGUFWriter(to, entries.pop("general.architecture", "llama"))
    for name, field in reader.fields.items():
        if name not in entries and not name.startswith("GGUF.") and name != "general.architecture":
            out.add_key_value(name, field.contents(), field.types[0], field.types[-1])
    for name, value in entries.items():
        if value is not None:
            out.add_key_value(name, value, gguf.GGUFValueType.get_type(value))
    for name, (form, data) in ({held.name: (held.tensor_type, held.data) for held in reader.tensors} | tensors).items():
        if form is not None:
            out.add_tensor(name, data, raw_dtype=form)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return to


@pytest.mark.parametrize("form", ["gguf-f32", "gguf-f16", "gguf-bf16", "gguf-q8_0", "gguf-q6_k", "gguf-q4_0", "gguf-q4_k_m"])
@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3"])
def test_each_value_is_what_its_block_stands_for_and_rows_are_as_they_were(kind, form, tmp_path):
    module = tiny(kind, **SIZES)
    file = written(module, tmp_path / "out", form)
    stored = {tensor.name: tensor.tensor_type for tensor in gguf.GGUFReader(file).tensors}
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA if kind in ("llama", "mistral") else gguf.MODEL_ARCH[kind.upper()], 2)
    after = mw.open(file).module.state_dict()
    assert after.keys() == module.state_dict().keys()
    for name, value in module.state_dict().items():
        held = stored[table.get_name(name, try_suffixes=(".weight", ".bias"))]
        if held.name in gguf_blocks.FORMS:
            value = torch.from_numpy(gguf.quants.dequantize(gguf_blocks.encode(value, held.name).numpy(), held))
        elif held.name != "F32":
            value = value.to({"F16": torch.float16, "BF16": torch.bfloat16}[held.name])
        assert torch.equal(after[name].float(), value.float()), name


@pytest.mark.parametrize("form", ["gguf-bf16", "gguf-q8_0", "gguf-q4_k_m"])
def test_slices_of_a_tensor_are_read_from_their_own_bytes(form, tmp_path, monkeypatch):
    file = written(tiny("llama", **SIZES), tmp_path / "out", form)
    whole = mw.open(file).module.state_dict()
    monkeypatch.setattr(slices, "SLICE", 1 << 13)  # so that every matrix has many
    for name, value in mw.open(file).module.state_dict().items():
        assert torch.equal(value, whole[name]), name


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [False, True])
def test_it_computes_what_the_model_did(kind, tied, tmp_path):
    module = tiny(kind, **SIZES, tie_word_embeddings=tied)
    opened = mw.open(written(module, tmp_path / "out"))
    assert opened.dense
    assert opened.marks == {"float"}
    assert opened.module.config.tie_word_embeddings == tied
    assert (opened.module.lm_head.weight is opened.module.model.embed_tokens.weight) == tied
    assert torch.equal(opened.module(IDS).logits, module(IDS).logits)


def test_biases_of_a_llama_come_back(tmp_path):
    module = tiny("llama", **SIZES, attention_bias=True, mlp_bias=True)
    for name, value in module.named_parameters():
        if name.endswith("bias"):
            value.data.normal_(generator=torch.Generator().manual_seed(len(name)))
    opened = mw.open(written(module, tmp_path / "out")).module
    assert torch.equal(opened(IDS).logits, module(IDS).logits)


def test_halves_are_put_back_by_hand():
    rows = torch.tensor([0, 2, 1, 3, 4, 6, 5, 7])[:, None]  # two heads of four, neighbours together
    assert halved(rows, 2)[:, 0].tolist() == list(range(8))
    many = torch.randn(48, 3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(halved(interleaved(many, 4), 4), many)


@pytest.mark.parametrize(("form", "dtype"), [("gguf-f16", torch.float16), ("gguf-bf16", torch.bfloat16), ("gguf-q8_0", torch.float32)])
def test_the_dtype_is_the_narrowest_that_holds_every_value(form, dtype, tmp_path):
    module = tiny("llama", **SIZES).to(dtype).float()
    assert mw.open(written(module, tmp_path / "one", form)).module.dtype == dtype
    module.model.norm.weight.data[0] = 1 + 2**-20  # a norm, which is stored in float32
    assert mw.open(written(module, tmp_path / "two", form)).module.dtype == torch.float32


@pytest.mark.parametrize("form", ["Q4_1", "Q5_1", "Q2_K", "Q3_K", "Q5_K", "IQ4_XS"])
def test_other_blocks_are_read_by_the_gguf_package(form, tmp_path):
    file, kind = written(tiny("llama", **SIZES), tmp_path / "out"), gguf.GGMLQuantizationType[form]
    values, nbytes = gguf.GGML_QUANT_SIZES[kind]
    stored = torch.randint(60, (512, 256 // values * nbytes), generator=torch.Generator().manual_seed(0)).to(torch.uint8).numpy()
    other = changed(file, tmp_path / "other.gguf", tensors={"blk.1.ffn_up.weight": (kind, stored)})
    found = mw.open(other).module.model.layers[1].mlp.up_proj.weight
    assert torch.equal(found, torch.from_numpy(gguf.quants.dequantize(stored, kind)))
    assert found.abs().max() > 0


def test_the_rotation_of_llama_3_is_known_by_its_factors(tmp_path):
    module = tiny("llama", **SIZES, rope_parameters=LLAMA_3)
    file = written(module, tmp_path / "out")
    held = {tensor.name: tensor.data for tensor in gguf.GGUFReader(file).tensors}["rope_freqs.weight"]
    assert [held[0], held[-1]] == [1, 8]  # high frequencies stay, low ones are 8 times lower
    assert len({*held}) > 2  # and some are between
    opened = mw.open(file).module
    assert opened.config.rope_parameters == LLAMA_3
    assert torch.equal(opened(IDS).logits, module(IDS).logits)
    other = changed(file, tmp_path / "other.gguf", tensors={"rope_freqs.weight": (gguf.GGMLQuantizationType.F32, held**2)})
    with pytest.raises(ModelError, match="are not the factors of Llama 3.1's rotation"):
        mw.open(other)


def test_a_folder_with_one_file_is_that_file_and_the_tokenizer_comes_along(tmp_path):
    own = mw.open("starter").tokenizer
    text = "def f(x):\n    return x + 1  # it's 2026, don't\t\n\nünïcode"
    file = written("starter", tmp_path / "out", "gguf-q8_0")
    beside = mw.open(tmp_path / "out")
    assert beside.sources == [file]
    assert beside.tokenizer(text).input_ids == own(text).input_ids
    (tmp_path / "alone").mkdir()
    alone = mw.open(shutil.copy(file, tmp_path / "alone" / "some.gguf"))
    assert alone.tokenizer(text).input_ids == own(text).input_ids
    assert alone.tokenizer.eos_token == own.eos_token


def test_a_tokenizer_with_other_words_is_not_taken(tmp_path, capsys):
    file = written("starter", tmp_path / "out", "gguf-q8_0")
    words = list(gguf.GGUFReader(file).fields["tokenizer.ggml.tokens"].contents())
    words[300], words[301] = words[301], words[300]
    other = changed(file, tmp_path / "out" / "other.gguf", {"tokenizer.ggml.tokens": words})
    file.unlink()
    assert mw.open(other).tokenizer.convert_ids_to_tokens(300) == words[300]
    none = changed(other, tmp_path / "none.gguf", {"tokenizer.ggml.tokens": None, "tokenizer.ggml.model": None})
    assert mw.open(none).tokenizer is None
    assert "none.gguf is opened without a tokenizer" in " ".join(capsys.readouterr().err.split())
    given = mw.open(none, tokenizer=mw.open("starter").tokenizer)
    given.save(tmp_path / "saved")
    assert mw.open(tmp_path / "saved").tokenizer("def f").input_ids == mw.open("starter").tokenizer("def f").input_ids


def test_it_is_planned_run_and_measured_as_any_model(tmp_path, text):
    file = written("starter", tmp_path / "out", "gguf-q4_k_m")
    dense = mw.open(file).module.state_dict()
    steps = (Step(Magnitude(sparsity=0.5)),)
    recipe = Recipe(model=str(file), data=str(text), samples=4, length=32, steps=steps, save=str(tmp_path / "run"))
    assert plan(recipe).rows[0].bytes == 4 * sum(value.numel() for name, value in dense.items() if name != "lm_head.weight")
    mw.run(recipe)
    done = mw.open(tmp_path / "run")
    weight = done.module.model.layers[0].mlp.up_proj.weight
    kept = weight != 0
    assert kept.float().mean() == pytest.approx(0.5, abs=0.01)
    assert torch.equal(weight[kept], dense["model.layers.0.mlp.up_proj.weight"][kept])
    assert mw.apply(file, Magnitude(sparsity=0.5), save=tmp_path / "applied").sources == [tmp_path / "applied"]


@pytest.mark.parametrize("share", [0.001, 0.01, 0.5, 0.999])
def test_a_truncated_file_is_refused(share, tmp_path):
    file = written("starter", tmp_path / "out", "gguf-q8_0")
    whole = file.read_bytes()
    file.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(WeightsError, match=r"model\.gguf is no whole GGUF file .* Fetch it again"):
        mw.open(file)


def test_what_is_no_gguf_file_is_refused(tmp_path):
    (tmp_path / "text.gguf").write_text("of another kind altogether")
    with pytest.raises(WeightsError, match="text.gguf is no whole GGUF file"):
        mw.open(tmp_path / "text.gguf")
    with pytest.raises(WeightsError, match=r"no such file\. Did you mean '.*text\.gguf'"):
        mw.open(tmp_path / "test.gguf")
    (tmp_path / "second.gguf").write_text("")
    with pytest.raises(WeightsError, match="holds no .safetensors file"):  # of two, none is chosen
        mw.open(tmp_path)


F32 = gguf.GGMLQuantizationType.F32


@pytest.mark.parametrize(
    ("entries", "tensors", "words"),
    [
        ({"general.architecture": "gemma3"}, {}, "holds a gemma3; GGUF is read here of llama, qwen2, qwen3"),
        ({"split.count": 3}, {}, "is one of 3 files. Join them"),
        ({"llama.expert_count": 8}, {}, "has experts, which is not read here"),
        ({"llama.rope.scaling.type": "yarn"}, {}, "positions that are rotated as yarn"),
        ({"llama.rope.dimension_count": 16}, {}, "heads that are rotated in part"),
        ({"llama.attention.head_count_kv": [2, 4]}, {}, "other numbers of heads or neurons from block to block"),
        ({"llama.attention.layer_norm_rms_epsilon": None}, {}, "does not say llama.attention.layer_norm_rms_epsilon"),
        ({}, {"blk.1.ffn_up.weight": (None, None)}, "lacks the tensor 'blk.1.ffn_up.weight'"),
        ({}, {"token_embd.weight": (None, None)}, "lacks the tensor 'token_embd.weight'"),
        ({}, {"blk.1.more.weight": (F32, torch.zeros(2, 2).numpy())}, "holds 1 tensors that no llama has, first 'blk.1.more.weight'"),
        ({}, {"blk.1.ffn_up.weight": (F32, torch.zeros(8, 256).numpy())}, r"'blk\.1\.ffn_up\.weight' is \[8, 256\], and .* \[512, 256\]"),
        ({}, {"blk.1.ffn_up.weight": (gguf.GGMLQuantizationType.I8, torch.zeros(512, 256, dtype=torch.int8).numpy())}, "stored as I8"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_other_models_are_refused_when_they_are_opened(entries, tensors, words, tmp_path):
    file = changed(written(tiny("llama", **SIZES), tmp_path / "out"), tmp_path / "other.gguf", entries, tensors)
    with pytest.raises((ModelError, WeightsError), match=words):
        mw.open(file)


def test_weights_that_are_not_finite_are_refused(tmp_path):
    file = written(tiny("llama", **SIZES), tmp_path / "out")
    bad = torch.zeros(512, 256)
    bad[3, 5] = torch.nan
    other = changed(file, tmp_path / "other.gguf", tensors={"blk.1.ffn_up.weight": (F32, bad.numpy())})
    with pytest.raises(WeightsError, match=r"model\.layers\.1\.mlp\.up_proj\.weight.* would hold NaN"):
        _ = mw.open(other).module

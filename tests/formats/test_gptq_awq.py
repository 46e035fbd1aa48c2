"""The layouts of GPTQ and AWQ: bit for bit as they are defined, and back."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import modelwright as mw
from modelwright.blocks.packed import PackedLinear
from modelwright.core.errors import ModelError
from modelwright.formats import awq, gptq
from modelwright.formats.awq import Awq
from modelwright.formats.gptq import Gptq
from modelwright.methods.quantize.rtn import Rtn


def random(rows, columns, bits, seed=0):
    half = 1 << (bits - 1)
    return torch.randint(-half, half, (rows, columns), generator=torch.Generator().manual_seed(seed), dtype=torch.int8)


def layer(bits=4, group=32, zero=True, rows=64, columns=128):
    """A layer of random codes whose zero points are all but the lowest."""
    groups = columns // group
    scale = torch.rand(rows, groups, generator=torch.Generator().manual_seed(1)).add(0.01).half()
    zeros = random(rows, groups, bits, seed=2).clamp(min=1 - (1 << (bits - 1))) if zero else None
    return PackedLinear.from_codes(random(rows, columns, bits), scale, zeros, bits)


def of_gptq(stored, bits, version):
    """The weight of a GPTQ layer [out, in] by its definition: a stream of bits for each output, another for each group."""

    def number(words, place):
        stream = sum((int(word) & 0xFFFFFFFF) << (32 * at) for at, word in enumerate(words))
        return stream >> (place * bits) & (2**bits - 1)

    rows, columns = stored["scales"].shape[1], len(stored["g_idx"])
    found = torch.empty(rows, columns, dtype=torch.float16)
    for i in range(columns):
        g = int(stored["g_idx"][i])
        for o in range(rows):
            zero = number(stored["qzeros"][g], o) + (version == 1)
            found[o, i] = stored["scales"][g, o] * (number(stored["qweight"][:, o], i) - zero)
    return found


def of_awq(stored, group):
    """The weight of an AWQ layer [out, in] by its definition."""

    def eight(word):
        return [int(word) >> 4 * place & 15 for place in (0, 4, 1, 5, 2, 6, 3, 7)]

    codes = torch.tensor([[number for word in row for number in eight(word)] for row in stored["qweight"].long()])
    zeros = torch.tensor([[number for word in row for number in eight(word)] for row in stored["qzeros"].long()])
    group_of = torch.arange(len(codes)) // group
    return ((codes - zeros[group_of]).half() * stored["scales"][group_of]).T


def test_words_of_symmetric_zero_points_are_the_known_ones():
    zeros = gptq.zeros_of(layer(zero=False))
    codes = random(64, 128, 4)
    assert (gptq.pack(codes, zeros, 4)[1] == 0x77777777).all()
    assert (gptq.pack(codes, zeros, 4, version=2)[1] == 0x88888888 - 2**32).all()


def test_a_word_of_gptq_holds_eight_inputs_from_the_lowest():
    codes = (torch.arange(8).repeat(8, 1) - 8).to(torch.int8)  # unsigned 0 to 7, along the inputs
    assert gptq.pack(codes, torch.zeros(8, 1, dtype=torch.int8), 4)[0].tolist() == [[0x76543210] * 8]


def test_a_word_of_awq_holds_outputs_in_its_own_order():
    columns = (torch.arange(8)[None] - 8).to(torch.int8)
    assert awq.pack(columns).tolist() == [[0x75316420]]
    assert torch.equal(awq.unpack(torch.tensor([[0x75316420]], dtype=torch.int32)), columns)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("bits", gptq.BITS)
def test_all_codes_and_zero_points_come_back_from_gptq(bits, version):
    every = torch.arange(-(1 << (bits - 1)), 1 << (bits - 1)).to(torch.int8)
    codes = torch.stack([every.roll(row).repeat(-(-256 // len(every)))[:256] for row in range(32)])
    zeros = every.repeat(-(-32 // len(every)))[:32, None].contiguous()
    qweight, qzeros = gptq.pack(codes, zeros, bits, version)
    assert (qweight.dtype, qzeros.dtype) == (torch.int32, torch.int32)
    assert (qweight.shape, qzeros.shape) == ((256 * bits // 32, 32), (1, bits))
    back, back_zeros = gptq.unpack(qweight, qzeros, bits, version)
    assert torch.equal(back, codes)
    assert torch.equal(back_zeros, zeros)


def test_all_codes_come_back_from_awq():
    codes = torch.stack([(torch.arange(16).roll(row) - 8).to(torch.int8) for row in range(16)])
    assert torch.equal(awq.unpack(awq.pack(codes)), codes)


def test_version_1_wraps_the_lowest_zero_point_alone():
    zeros = torch.tensor([-8, -7, 7, 0, -8, 7, -7, 0], dtype=torch.int8)[:, None]
    word = int(gptq.pack(random(8, 8, 4), zeros, 4)[1]) & 0xFFFFFFFF
    assert [word >> 4 * place & 15 for place in range(8)] == [15, 0, 14, 7, 15, 14, 0, 7]


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(("bits", "zero"), [(2, True), (3, True), (4, True), (4, False), (8, True)])
def test_gptq_keeps_every_weight_in_float16(bits, zero, version):
    given = layer(bits, zero=zero, rows=32, columns=64)
    layout = Gptq(version)
    stored = layout.tensors(given)
    assert torch.equal(of_gptq(stored, bits, version), given.dense())
    config = layout.config(given, False, ["lm_head"], "lm_head")
    assert (config["checkpoint_format"], config["sym"]) == ("gptq" if version == 1 else "gptq_v2", not zero)
    back = layout.layer(stored, config, torch.float16)
    assert torch.equal(back.dense(), given.dense())
    assert back.describe() == given.describe()


@pytest.mark.parametrize("zero", [True, False])
def test_from_awq_to_gptq_and_back_keeps_every_weight_in_float16(zero):
    given = layer(zero=zero)
    one = Awq().tensors(given)
    assert torch.equal(of_awq(one, 32), given.dense())
    ours = Awq().layer(one, {"group_size": 32}, torch.float16)
    two = Gptq().layer(Gptq().tensors(ours), {"bits": 4}, torch.float16)
    three = Awq().tensors(two)
    assert torch.equal(two.dense(), given.dense())
    assert all(torch.equal(one[name], three[name]) for name in one)


@pytest.mark.parametrize(
    ("form", "method"),
    [
        ("gptq", Rtn(group=32)), ("gptq", Rtn(group=0, bits=8)), ("gptq", Rtn(group=128, bits=3)),
        ("gptq_v2", Rtn(group=32, symmetric=False)), ("awq", Rtn(group=64, symmetric=False)), ("awq", Rtn(group=32)),
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_a_folder_comes_back_with_the_same_layers(form, method, kind, quantised, tmp_path):
    model = quantised(method, kind)
    assert mw.export(model, tmp_path / "out", form) == tmp_path / "out"
    files = load_file(tmp_path / "out" / "model.safetensors")
    assert not [name for name in files if "proj.weight" in name]
    back = mw.open(tmp_path / "out")
    assert back.marks == {"packed"}
    assert not back.loaded
    before, after = model.module.state_dict(), back.module.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert back.history[0]["method"] == "quantize.rtn"
    assert back.tokenizer("abc").input_ids == model.tokenizer("abc").input_ids


def test_the_config_says_what_readers_ask_for(quantised, tmp_path):
    mw.export(quantised(Rtn(group=32, where=["mlp", "attn.{q,k,v}"])), tmp_path / "gptq", "gptq")
    stated = json.loads((tmp_path / "gptq" / "config.json").read_text())["quantization_config"]
    left = {f"-:^model\\.layers\\.{block}\\.self_attn\\.o_proj$": {} for block in range(2)}
    assert stated == {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True, "lm_head": False,
                      "checkpoint_format": "gptq", "pack_dtype": "int32", "dynamic": left}  # fmt: skip
    mw.export(quantised(Rtn(group=0)), tmp_path / "awq", "awq")
    stated = json.loads((tmp_path / "awq" / "config.json").read_text())["quantization_config"]
    assert stated == {"quant_method": "awq", "bits": 4, "group_size": -1, "zero_point": True, "version": "gemm",
                      "modules_to_not_convert": None}  # fmt: skip


def test_scales_are_kept_where_the_model_has_bfloat16(quantised, tmp_path):
    """Float16 holds the scales of bfloat16, and the other way round not: what is opened computes in float16."""
    model = quantised(Rtn(group=32), dtype=torch.bfloat16)
    mw.export(model, tmp_path / "out", "gptq")
    back = mw.open(tmp_path / "out").module
    one, two = (each.model.layers[0].mlp.up_proj for each in (model.module, back))
    assert torch.equal(one.weight_scale.float(), two.weight_scale.float())
    assert two.dense().dtype == back.model.norm.weight.dtype == torch.float16
    assert torch.equal(two.dense().bfloat16(), one.dense())


def changed(folder, **stated):
    file = folder / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"] |= stated
    file.write_text(json.dumps(config))


def test_groups_in_an_order_of_their_own_are_refused(quantised, tmp_path):
    mw.export(quantised(Rtn(group=32)), tmp_path / "out", "gptq")
    file = tmp_path / "out" / "model.safetensors"
    held = load_file(file)
    held["model.layers.1.mlp.up_proj.g_idx"] = held["model.layers.1.mlp.up_proj.g_idx"].flip(0).contiguous()
    save_file(held, file, {"format": "pt"})
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.up_proj is in the GPTQ format, and its inputs belong to groups in an order"):
        _ = mw.open(tmp_path / "out").module


@pytest.mark.parametrize(
    ("form", "stated", "words"),
    [
        ("gptq", {"bits": 5}, "GPTQ format with bits 5"),
        ("gptq", {"checkpoint_format": "marlin"}, "in its form marlin"),
        ("gptq", {"dynamic": {"+:.*up_proj": {"bits": 8}}}, "settings of their own for some layers"),
        ("awq", {"version": "gemv"}, "AWQ format in its version gemv with bits 4"),
    ],
    ids=str,
)
def test_what_no_layer_can_be_is_refused_when_it_is_opened(form, stated, words, quantised, tmp_path):
    mw.export(quantised(Rtn(group=32)), tmp_path / "out", form)
    changed(tmp_path / "out", **stated)
    with pytest.raises(ModelError, match=words):
        mw.open(tmp_path / "out")


@pytest.mark.parametrize(
    ("form", "method", "words"),
    [
        ("gptq", Rtn(group=32, bits=5), r"cannot hold 14 layers, first .*0\.self_attn\.q_proj, which has bits 5, and there are 2, 3"),
        ("awq", Rtn(group=32, bits=8), "has bits 8, and there are 4"),
        ("awq", Rtn(group=32, grid="nf4"), "is a LevelsLinear"),
        ("gptq", Rtn(group=32, bits={"attn": 4, "mlp": 8}), r"one setting for all layers.*self_attn\.q_proj: bits 4.*gate_proj: bits 8"),
        ("gptq", Rtn(group={"attn": 32, "mlp": 64}), "group 32.*group 64"),
        ("awq", Rtn(group=32, where=["attn", "embed"]), "first model.embed_tokens, which is a PackedEmbedding, in the place of Embedding"),
    ],
    ids=str,
)
def test_what_a_format_cannot_hold_is_named_before_anything_is_written(form, method, words, quantised, tmp_path):
    with pytest.raises(ModelError, match=words):
        mw.export(quantised(method, tie_word_embeddings=False), tmp_path / "out", form)
    assert not (tmp_path / "out").exists()


def test_zero_points_that_version_1_cannot_say_are_named():
    given = PackedLinear.from_codes(random(32, 32, 4), torch.ones(32, 1).half(), torch.full((32, 1), -8, dtype=torch.int8), 4)
    assert "write gptq_v2" in Gptq(1).unfit(given)
    assert Gptq(2).unfit(given) == ""


def test_float_zero_points_rounded_inputs_and_odd_sizes_are_named():
    scale = torch.ones(12, 1).half()
    assert "float zero points" in Awq().unfit(PackedLinear.from_codes(random(12, 32, 4), scale, scale, 4))
    assert "rounds its inputs" in Gptq().unfit(PackedLinear.from_codes(random(12, 32, 4), scale, None, 4, inputs=8))
    assert "12 outputs, which are no multiple of 8" in Awq().unfit(PackedLinear.from_codes(random(12, 32, 4), scale, None, 4))
    assert "12 outputs of 4 bits, which fill no whole words" in Gptq().unfit(PackedLinear.from_codes(random(12, 32, 4), scale, None, 4))
    small = PackedLinear.from_codes(random(16, 32, 4), torch.full((16, 1), 1e-12), None, 4)
    assert "scales that float16 cannot hold" in Gptq().unfit(small)

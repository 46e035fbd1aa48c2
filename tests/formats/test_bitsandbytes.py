"""The layouts of bitsandbytes: byte for byte those that it makes itself, and back."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import modelwright as mw
from modelwright.blocks.levels import LevelsLinear
from modelwright.blocks.packed import PackedLinear
from modelwright.core.errors import ModelError
from modelwright.formats.bitsandbytes import LAYOUT, STATE, pack, unpack
from modelwright.maths.scales import dynamic_map
from modelwright.methods.prune.magnitude import Magnitude
from modelwright.methods.quantize.dequantize import Dequantize
from modelwright.methods.quantize.llm_int8 import LlmInt8
from modelwright.methods.quantize.nf4 import Nf4
from modelwright.methods.quantize.rtn import Rtn

WEIGHT = torch.randn(96, 512, generator=torch.Generator().manual_seed(3))
METHODS = [Nf4(), Nf4(nested=False, group=128), Nf4(group=0), LlmInt8()]


def test_the_first_of_two_codes_is_in_the_high_bits():
    assert pack(torch.tensor([[1, 2, 15, 0]], dtype=torch.uint8)).tolist() == [[0x12], [0xF0]]
    every = torch.stack([torch.arange(16).roll(row) for row in range(16)]).to(torch.uint8)
    assert torch.equal(unpack(pack(every), 16), every)


def test_an_eight_bit_row_by_hand():
    layer = PackedLinear.from_codes(torch.tensor([[127, -64]], dtype=torch.int8), torch.tensor([[0.5]]), None, 8, inputs=8, threshold=6.0)
    stored = LAYOUT.tensors(layer)
    assert stored["weight"].tolist() == [[127, -64]]
    assert stored["SCB"].tolist() == [63.5]  # the largest size that the row can have
    assert (stored["weight_format"].item(), stored["weight_format"].dtype) == (0, torch.uint8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_nf4_is_byte_for_byte_what_bitsandbytes_makes(dtype):
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = WEIGHT.to(dtype)
    codes, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=False)
    expected = {"weight": codes} | {f"weight.{name}": value for name, value in state.as_dict(packed=True).items()}
    found = LAYOUT.tensors(Nf4(nested=False).tensor(weight))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) and found[name].dtype == expected[name].dtype for name in found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_nested_scales_are_what_bitsandbytes_makes_or_nearer(dtype):
    """Its code for the processor takes a neighbour of the nearest of the 256 levels now and then. Ours chooses codes with stored scales."""
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = WEIGHT.to(dtype)
    codes, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True)
    expected = {f"weight.{name}": value for name, value in state.as_dict(packed=True).items()}
    found = LAYOUT.tensors(Nf4().tensor(weight))
    assert found.keys() == {"weight", *expected}
    same = [name for name in expected if name != "weight.absmax"]
    assert all(torch.equal(found[name], expected[name]) and found[name].dtype == expected[name].dtype for name in same)
    other = found["weight.absmax"] != expected["weight.absmax"]
    assert other.float().mean() < 0.01
    largest = weight.float().view(-1, 64).abs().amax(1) - state.offset
    of = lambda bytes_: dynamic_map().decode(bytes_) * found["weight.nested_absmax"].repeat_interleave(256)[: len(largest)]  # noqa: E731
    ours, theirs = ((of(each) - largest).abs() for each in (found["weight.absmax"], expected["weight.absmax"]))
    assert (ours <= theirs + 1e-6).all()
    assert (found["weight"] != codes).float().mean() < 0.02


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_plain_transformers_loads_it_with_the_same_weights(method, quantised, tmp_path):
    functional = pytest.importorskip("bitsandbytes.functional")
    from transformers import AutoModelForCausalLM

    model = quantised(method)
    mw.export(model, tmp_path / "out", "bitsandbytes")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", device_map="cpu")
    for path in ("model.layers.1.mlp.up_proj", "model.layers.0.self_attn.k_proj"):
        layer, own = loaded.get_submodule(path), model.module.get_submodule(path)
        if isinstance(method, LlmInt8):
            assert type(layer).__name__ == "Linear8bitLt"
            found = functional.int8_vectorwise_dequant(layer.weight.data, layer.weight.SCB).half()
        else:
            assert type(layer).__name__ == "Linear4bit"
            found = functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        assert torch.equal(found, own.dense())
    assert type(loaded.lm_head) is torch.nn.Linear


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_folder_comes_back_with_the_same_layers(method, dtype, quantised, tmp_path):
    model = quantised(method, "qwen2", dtype)
    mw.export(model, tmp_path / "out", "bitsandbytes")
    back = mw.open(tmp_path / "out")
    before, after = model.module.state_dict(), back.module.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) and before[name].dtype == after[name].dtype for name in before)
    assert back.module.model.layers[0].mlp.up_proj.describe() == model.module.model.layers[0].mlp.up_proj.describe()


def test_what_bitsandbytes_saves_is_opened_and_worked_on(small, tmp_path):
    """Blocks of 64 fit rows of 64 and not of 160; that is said by name."""
    functional = pytest.importorskip("bitsandbytes.functional")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                                bnb_4bit_compute_dtype=torch.float32, llm_int8_skip_modules=["lm_head", "down_proj"])  # fmt: skip
    made = AutoModelForCausalLM.from_pretrained(small, quantization_config=config, device_map="cpu")
    made.save_pretrained(tmp_path / "theirs")
    model = mw.open(tmp_path / "theirs")
    assert model.marks == {"packed"}
    for path in ("model.layers.1.mlp.up_proj", "model.layers.0.self_attn.k_proj"):
        weight = made.get_submodule(path).weight
        assert torch.equal(model.module.get_submodule(path).dense(), functional.dequantize_4bit(weight.data, weight.quant_state))
    dense = mw.apply(tmp_path / "theirs", Dequantize())
    pruned = mw.apply(dense, Magnitude(sparsity=0.5), save=tmp_path / "pruned")
    assert (pruned.module.model.layers[1].mlp.up_proj.weight == 0).float().mean() == pytest.approx(0.5, abs=0.01)
    assert "quantization_config" not in json.loads((tmp_path / "pruned" / "config.json").read_text())

    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    AutoModelForCausalLM.from_pretrained(small, quantization_config=config, device_map="cpu").save_pretrained(tmp_path / "across")
    with pytest.raises(ModelError, match=r"down_proj is in the bitsandbytes format, and its blocks of 64 run over the ends of rows of 160"):
        _ = mw.open(tmp_path / "across").module


def test_eight_bits_that_bitsandbytes_saves_are_opened(small, tmp_path):
    functional = pytest.importorskip("bitsandbytes.functional")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    made = AutoModelForCausalLM.from_pretrained(
        small, quantization_config=BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=5.0), dtype=torch.float16, device_map="cpu"
    )
    made.save_pretrained(tmp_path / "theirs")
    layer, weight = (each.model.layers[1].mlp.down_proj for each in (mw.open(tmp_path / "theirs").module, made))
    weight = weight.weight
    assert (layer.inputs, layer.threshold) == (8, 5.0)
    expected = functional.int8_vectorwise_dequant(weight.data, weight.SCB)
    assert torch.allclose(layer.dense().float(), expected, rtol=2**-10, atol=0)  # scales are rounded to float16


@pytest.mark.parametrize(
    ("method", "words"),
    [
        (Rtn(group=32), "has a PackedLinear, and there are NF4 and whole numbers of 8 bits. Use quantize.nf4"),
        (Rtn(bits=8, group=0), "rounds no inputs to 8 bits"),
        (Rtn(bits=8, group=32), "has groups or zero points"),
        (Rtn(grid="mxfp4", group=32), "has e2m1 levels"),
        (Nf4(group=16), "has groups of 16 weights"),
    ],
    ids=str,
)
def test_what_it_cannot_hold_is_named_before_anything_is_written(method, words, quantised, tmp_path):
    with pytest.raises(ModelError, match=words):
        mw.export(quantised(method), tmp_path / "out", "bitsandbytes")
    assert not (tmp_path / "out").exists()


def test_other_levels_than_those_of_nf4_are_refused(quantised, tmp_path):
    mw.export(quantised(Nf4()), tmp_path / "out", "bitsandbytes")
    file = tmp_path / "out" / "model.safetensors"
    held = load_file(file)
    assert f"model.layers.0.mlp.up_proj.{STATE}" in held
    held["model.layers.0.mlp.up_proj.weight.quant_map"] += 1e-3
    save_file(held, file, {"format": "pt"})
    with pytest.raises(ModelError, match=r"up_proj is in the bitsandbytes format, and its levels are none of NF4"):
        _ = mw.open(tmp_path / "out").module
    del held["model.layers.0.mlp.up_proj.weight.absmax"]
    save_file(held, file, {"format": "pt"})
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    config["quantization_config"]["bnb_4bit_quant_type"] = "fp4"
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="bitsandbytes format with fp4 in uint8, and cannot be opened yet"):
        mw.open(tmp_path / "out")


def test_a_tensor_that_is_missing_is_named(quantised, tmp_path):
    mw.export(quantised(Nf4()), tmp_path / "out", "bitsandbytes")
    file = tmp_path / "out" / "model.safetensors"
    held = load_file(file)
    del held["model.layers.0.mlp.up_proj.weight.absmax"]
    save_file(held, file, {"format": "pt"})
    with pytest.raises(ModelError, match=r"up_proj lacks its tensor 'weight\.absmax'"):
        _ = mw.open(tmp_path / "out").module


def test_the_layers_that_are_opened_are_of_the_kinds_that_nf4_makes():
    layer = LAYOUT.layer(LAYOUT.tensors(Nf4().tensor(WEIGHT)), {}, torch.float32)
    assert isinstance(layer, LevelsLinear)
    assert torch.equal(layer.dense(), Nf4().tensor(WEIGHT).dense())

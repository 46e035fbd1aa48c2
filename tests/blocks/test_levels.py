"""Layers of levels and of 8-bit floats: what they hold, what is written, and what others read of it."""

import subprocess
import sys

import pytest
import torch
from tiny import tiny

import modelwright as mw
from modelwright.blocks.float8 import Float8Linear
from modelwright.blocks.levels import LevelsLinear
from modelwright.core.errors import ModelError
from modelwright.core.loading import translated
from modelwright.maths import grids
from modelwright.methods.quantize.fp8 import Fp8
from modelwright.methods.quantize.mxfp4 import Mxfp4
from modelwright.methods.quantize.nf4 import Nf4
from modelwright.methods.quantize.nvfp4 import Nvfp4
from modelwright.methods.quantize.rtn import Rtn

WEIGHT = torch.randn(40, 128, generator=torch.Generator().manual_seed(1)).bfloat16()
ALL = [Nf4(), Nf4(nested=False), Mxfp4(), Nvfp4(), Fp8(), Fp8(scope="tensor"), Rtn(grid="k-means", bits=3, group=32),
       Rtn(grid="odd", bits=5, group=32), Rtn(grid="fp4", group=32, nested=True)]  # fmt: skip
PLAIN = [Mxfp4(), Nvfp4(), Fp8(), Fp8(scope="tensor")]  # that compressed-tensors has a name for
READ = """
import sys, torch, transformers
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
from compressed_tensors.compressors import decompress_module
layer = model.model.layers[1].mlp.up_proj
if "weight" not in dict(layer.named_parameters()) or layer.weight.dtype != torch.bfloat16:
    decompress_module(layer)
assert "modelwright" not in sys.modules
torch.save(layer.weight.detach(), sys.argv[2])
"""


def model(hidden=128):
    return tiny("llama", hidden_size=hidden).to(torch.bfloat16)


@pytest.mark.parametrize("method", ALL, ids=repr)
def test_the_layer_stands_for_what_the_grid_gives_and_says_its_size(method):
    layer = method.tensor(WEIGHT)
    if isinstance(layer, Float8Linear):
        expected = grids.nearest(WEIGHT, grids.float8(WEIGHT, method.scope))
    else:
        expected = grids.nearest(WEIGHT, method.fitted(WEIGHT))
    assert layer.dense().dtype == torch.bfloat16
    assert torch.equal(layer.dense(), expected.bfloat16())
    assert (layer.dense().float() - WEIGHT.float()).square().mean() < 0.05 * WEIGHT.float().square().mean()
    x = torch.randn(3, 128).bfloat16()
    assert torch.equal(layer(x), x @ layer.dense().T)
    planned = method.planned(WEIGHT.to("meta"))
    assert {name: (value.shape, value.dtype) for name, value in planned.state_dict().items()} == {
        name: (value.shape, value.dtype) for name, value in layer.state_dict().items()
    }


def test_bits_of_a_matrix_by_hand():
    # 128 columns of 4 bits are 64 bytes; NF4: two scales of a row in 8 bits each; of all 80 together one float32, and one for the mean.
    assert Nf4().tensor(WEIGHT).stored_bytes() == 40 * (64 + 2) + 4 + 4
    assert Nf4(nested=False).tensor(WEIGHT).stored_bytes() == 40 * (64 + 2 * 4)
    assert Mxfp4().tensor(WEIGHT).stored_bytes() == 40 * (64 + 4)
    assert Nvfp4().tensor(WEIGHT).stored_bytes() == 40 * (64 + 8) + 4
    assert Fp8().tensor(WEIGHT).stored_bytes() == 40 * (128 + 2)
    assert Rtn(grid="k-means", bits=3, group=32).tensor(WEIGHT).stored_bytes() == 40 * (48 + 4 * 2) + 8 * 4


@pytest.mark.parametrize("method", ALL, ids=repr)
def test_tensors_of_the_format_keep_their_dtype_when_the_model_gets_another(method):
    layer = method.tensor(WEIGHT)
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    layer.to(torch.float32)
    assert layer.dense().dtype == torch.float32
    for name in layer.exact:
        if name in before:
            assert layer.state_dict()[name].dtype == before[name].dtype
    layer.to(torch.bfloat16)
    for name, value in before.items():
        assert torch.equal(layer.state_dict()[name].view(torch.uint8), value.view(torch.uint8)), name


@pytest.mark.parametrize("method", ALL, ids=repr)
def test_saved_in_16_bits_it_loads_bit_for_bit(method, tmp_path):
    made = mw.apply(model(), method, save=tmp_path / "out")
    for loaded in (mw.open(tmp_path / "out").module, load(tmp_path / "out")):
        for name, value in made.module.state_dict().items():
            other = loaded.state_dict()[name]
            assert other.dtype == value.dtype, name
            assert torch.equal(other.contiguous().view(torch.uint8), value.contiguous().view(torch.uint8)), name


def load(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)


@pytest.mark.parametrize("method", PLAIN, ids=repr)
def test_transformers_without_us_reads_the_same_weights(method, tmp_path):
    made = mw.apply(model(), method, save=tmp_path / "out")
    done = subprocess.run([sys.executable, "-c", READ, tmp_path / "out", tmp_path / "weight.pt"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    ours, theirs = made.module.model.layers[1].mlp.up_proj.dense(), torch.load(tmp_path / "weight.pt")
    assert torch.equal(ours, theirs)


def test_inputs_that_a_checkpoint_wants_rounded_are_not_ignored():
    weights = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": False, "strategy": "channel"}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": {"num_bits": 8}, "format": "float-quantized"}
    with pytest.raises(ModelError, match="rounds inputs otherwise than token by token"):
        translated({"config_groups": {"group_0": group}}, tiny("llama"))


def test_a_table_of_its_own_is_stored_and_named_ones_are_not():
    assert Rtn(grid="k-means", bits=3, group=32).tensor(WEIGHT).weight_levels.shape == (8,)
    assert Nf4().tensor(WEIGHT).weight_levels is None
    assert isinstance(Nf4().tensor(WEIGHT), LevelsLinear)

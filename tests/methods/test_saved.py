"""What methods leave loads elsewhere: symmetric integers in plain transformers, the rest after `import modelwright`."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from calibration import batches
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import outputs, tiny, tiny_inputs

import modelwright as mw
from modelwright.core.model import Model
from modelwright.methods.encode.bitstack import Bitstack
from modelwright.methods.factor.svd import Svd
from modelwright.methods.prune.flap import Flap
from modelwright.methods.prune.magnitude import Magnitude
from modelwright.methods.quantize.dequantize import Dequantize
from modelwright.methods.quantize.fp8 import Fp8
from modelwright.methods.quantize.gptq import Gptq
from modelwright.methods.quantize.llm_int8 import LlmInt8
from modelwright.methods.quantize.rtn import Rtn
from modelwright.methods.quantize.smoothquant import SmoothQuant

PLAIN = {
    "bits 4, groups": (Rtn(bits=4, group=32), {}, torch.bfloat16),
    "bits 4, rows": (Rtn(bits=4, group=0), {}, torch.float32),
    "bits 8, groups": (Gptq(bits=8, group=32), {}, torch.float32),
    "bits 8, rows": (Rtn(bits=8, group=0), {}, torch.float16),
    "bits 3, groups": (Gptq(bits=3, group=32, order=True), {}, torch.float32),
    "bits by role": (Rtn(bits={"mlp": 4, "attn": 8}, group=32), {}, torch.bfloat16),
    "bits by role, float32": (Rtn(bits={"mlp": 4, "attn": 8}, group=32), {}, torch.float32),
    "a tied head": (Rtn(bits=4, group=32), {"tie_word_embeddings": True}, torch.float32),
    "biases": (Rtn(bits=4, group=32), {"attention_bias": True, "mlp_bias": True}, torch.float32),
    "inputs too": (SmoothQuant(), {}, torch.bfloat16),
    "few bits of inputs": (LlmInt8(bits=4, inputs=4, threshold=0.0), {}, torch.float32),
    "the head too": (Rtn(bits=8, group=32, where=("attn.*", "mlp.*", "head")), {}, torch.float32),
}
OURS = {
    "low rank": ("llama", Svd(keep=0.5)),
    "sparse": ("llama", Magnitude(sparsity=0.6, store="sparse")),
    "asymmetric": ("llama", Rtn(bits=4, group=32, symmetric=False)),
    "experts": ("qwen3_moe", Rtn(bits=4, group=16)),
    "stored the other way": ("gpt2", Rtn(bits=4, group=32)),
    "terms": ("llama", Bitstack(terms=3, rank=4, tries=2)),
    "integers of other widths": ("llama", [Flap(), Rtn(bits=4, group=0)]),
    "floats of other widths": ("opt", [Flap(), Fp8()]),
    "of other widths, made dense": ("llama", [Flap(), Rtn(bits=8, group=0), Dequantize()]),
    "factors of integers": ("llama", [Svd(rank=16), Rtn(bits=4, group=16, where="mlp.*")]),
}
ORDERS = {
    "transformers alone": "from transformers import AutoModelForCausalLM",
    "modelwright first": "import modelwright\nfrom transformers import AutoModelForCausalLM",
    "transformers first": "from transformers import AutoModelForCausalLM\nimport modelwright",
}
LOAD = """
import sys, torch
from safetensors.torch import load_file, save_file
for folder in sys.argv[2:]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    with torch.no_grad():
        found = {"logits": model(**load_file(folder + "/inputs.safetensors")).logits}
    found |= {name: value.detach().clone() for name, value in model.named_parameters()}
    save_file(found, folder + "/" + sys.argv[1] + ".found")
"""


def elsewhere(order: str, folders: dict[str, Path]) -> subprocess.Popen[str]:
    """Begin to load every folder in another Python; its weights and logits go to a file there."""
    ours = order != "transformers alone"
    paths = {"PYTHONPATH": str(Path(mw.__file__).parents[1]) if ours else "", "OMP_NUM_THREADS": "1"}
    script = f"{ORDERS[order]}\n{LOAD}\nassert ('modelwright' in sys.modules) is {ours}"
    command = [sys.executable, "-W", "ignore", "-c", script, order, *map(str, folders.values())]
    return subprocess.Popen(command, env=os.environ | paths, stderr=subprocess.PIPE, text=True)


def saved(models: dict[str, Model], top: Path) -> dict[str, Path]:
    folders = {name: top / str(number) for number, name in enumerate(models)}
    for name, folder in folders.items():
        models[name].save(folder)
        inputs = {key: value.contiguous() for key, value in tiny_inputs(models[name].module).items()}
        save_file(inputs, folder / "inputs.safetensors")
    return folders


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """Every case as (model, its folder, what was found elsewhere), by order of imports and case."""
    plain, ours = {}, {}
    for name, (method, config, dtype) in PLAIN.items():
        module = tiny("llama", **config).to(dtype)
        plain[name] = mw.apply(mw.open(module), method, data=batches(module))
    for name, (kind, method) in OURS.items():
        module = tiny(kind)
        ours[name] = mw.apply(mw.open(module), method, data=batches(module))
    models = {order: plain if order == "transformers alone" else ours for order in ORDERS}
    folders = {id(group): saved(group, tmp_path_factory.mktemp("saved")) for group in (plain, ours)}
    running = {order: elsewhere(order, folders[id(group)]) for order, group in models.items()}
    for process in running.values():
        _, errors = process.communicate()
        assert process.returncode == 0, errors
    return {
        (order, name): (group[name], folder, load_file(folder / f"{order}.found"))
        for order, group in models.items()
        for name, folder in folders[id(group)].items()
    }


@pytest.fixture
def plain(loaded):
    return {name: found for (order, name), found in loaded.items() if order == "transformers alone"}


@pytest.mark.parametrize("case", PLAIN)
def test_plain_transformers_decompresses_the_same_weights(plain, case):
    model, _, found = plain[case]
    packed = [(name, layer) for name, layer in model.module.named_modules() if hasattr(layer, "weight_packed")]
    assert len(packed) == 4 * 7 + (case == "the head too")
    for name, layer in packed:
        assert torch.equal(found[f"{name}.weight"], layer.dense()), name
        if layer.bias is not None:
            assert torch.equal(found[f"{name}.bias"], layer.bias), name
    assert torch.equal(found["model.embed_tokens.weight"], model.module.model.embed_tokens.weight)


@pytest.mark.parametrize("case", [name for name, (_, _, dtype) in PLAIN.items() if dtype == torch.float32])
def test_plain_transformers_gives_the_same_logits(plain, case):
    model, _, found = plain[case]
    assert torch.allclose(found["logits"], outputs(model.module), atol=1e-5)


@pytest.mark.parametrize("case", PLAIN)
def test_a_packed_layer_stores_no_dense_weight_and_all_others_are_ignored_by_name(plain, case):
    model, folder, _ = plain[case]
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        names = set(file.keys())
        assert file.metadata() == {"format": "pt"}
    packed = {name for name, layer in model.module.named_modules() if hasattr(layer, "weight_packed")}
    for name in packed:
        assert {f"{name}.weight_packed", f"{name}.weight_scale", f"{name}.weight_shape"} <= names
        assert f"{name}.weight" not in names
        assert f"{name}.weight_zero_point" not in names
    stated = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert stated["ignore"] == ([] if "lm_head" in packed else ["lm_head"])
    assert stated["quant_method"] == "compressed-tensors"


def test_they_stay_packed_when_opened_here(plain):
    model, folder, _ = plain["bits by role, float32"]
    again = mw.open(folder)
    assert torch.equal(outputs(again.module), outputs(model.module))
    assert again.module.model.layers[1].mlp.up_proj.bits == 4
    assert again.module.model.layers[1].self_attn.q_proj.bits == 8


@pytest.mark.parametrize("case", OURS)
@pytest.mark.parametrize("order", ["modelwright first", "transformers first"])
def test_after_import_modelwright_transformers_gives_the_same_logits(loaded, order, case):
    model, _, found = loaded[order, case]
    assert torch.get_num_threads() == 1  # as in the other process, so that sums have one order
    assert torch.equal(found["logits"], outputs(model.module))
    for name, value in model.module.named_parameters():
        assert torch.equal(found[name], value), name

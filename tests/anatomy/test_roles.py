"""Every tensor of every family has one role, from its name alone."""

import subprocess
import sys

import pytest
import torch
from tiny import MODELS, MODULES, tiny
from torch import nn

from modelwright.anatomy import Part, anatomy_of, families, matches, roles
from modelwright.core.errors import SiteError


@pytest.fixture(params=MODELS)
def model(request):
    return tiny(request.param)


def test_every_matrix_is_one_site_with_a_role_of_its_own(model):
    sites = anatomy_of(model).sites(model)
    matrices = [name for name, weight in model.named_parameters() if weight.squeeze().ndim >= 2 or weight.ndim == 2]
    assert [site.name for site in sites] == matrices
    assert not {site.role for site in sites} & {"linear", "conv", "parameter", "norm"}


def test_every_parameter_has_a_role(model):
    anatomy = anatomy_of(model)
    assert [name for name, _ in model.named_parameters(remove_duplicate=False) if anatomy.role(name) is None] == []


def test_role_of_a_name_agrees_with_sites(model):
    anatomy = anatomy_of(model)
    for site in anatomy.sites(model):
        assert anatomy.role(site.name) == (site.role, site.depth)
        assert (site.depth is None) == (site.depths == 0)
        weight = model.get_parameter(site.name)
        assert site.stack == (len(weight) if weight.ndim == 3 and site.role.startswith("experts") else 0)
        assert site.transposed == (type(model.get_submodule(site.module)).__name__ == "Conv1D")


def test_names_on_disk_have_roles(model, tmp_path):
    from safetensors import safe_open

    model.save_pretrained(tmp_path)
    anatomy = anatomy_of(model.config.to_dict())
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        unknown = [name for name in file.keys() if anatomy.role(name) is None]  # noqa: SIM118
        found = {anatomy.role(name)[0] for name in file.keys()}  # noqa: SIM118
    assert unknown == []
    whole = {site.role.replace("experts.gate_up", "experts.gate") for site in anatomy.sites(model)}
    assert whole <= found


def test_blocks_are_found_by_path(model):
    anatomy = anatomy_of(model)
    paths = anatomy.stack_paths(model)
    assert anatomy.blocks(model) == (paths[0] if len(paths) == 1 else None)
    assert [len(model.get_submodule(path)) for path in paths] == [4] * len(paths)
    assert len(paths) == (2 if model.config.model_type in ("t5", "clip") else 1)


def test_parts_cover_the_rows_of_fused_weights(model):
    for site in anatomy_of(model).sites(model):
        assert bool(site.parts) == (site.role in ("attn.qkv", "mlp.gate_up", "experts.gate_up"))
        if site.parts:
            shape = model.get_parameter(site.name).shape
            assert [part.start for part in site.parts] == [0, *(part.stop for part in site.parts[:-1])]
            assert site.parts[-1].stop == shape[-1 if site.transposed else -2]


def test_a_config_promises_the_ties_that_the_model_has(model):
    anatomy = anatomy_of(model)
    promised = {frozenset(names) for names in anatomy.tied(model.config)}
    assert {frozenset(names) for names in anatomy.tied(model)} == promised


@pytest.mark.parametrize(
    ("model_type", "name", "expected"),
    [
        ("mixtral", "model.layers.31.block_sparse_moe.experts.7.w1.weight", ("experts.gate", 31)),
        ("mixtral", "model.layers.0.block_sparse_moe.experts.0.w2.weight", ("experts.down", 0)),
        ("mixtral", "model.layers.0.block_sparse_moe.gate.weight", ("router", 0)),
        ("qwen3_moe", "model.layers.3.mlp.experts.12.gate_proj.weight", ("experts.gate", 3)),
        ("qwen3_moe", "model.layers.3.mlp.gate.weight", ("router", 3)),
        ("qwen3_moe", "model.layers.3.mlp.gate_proj.weight", ("mlp.gate", 3)),
        ("gpt2", "h.11.attn.c_attn.weight", ("attn.qkv", 11)),
        ("gpt2", "h.11.attn.bias", None),
        ("bert", "encoder.layer.2.attention.self.key.bias", ("attn.k", 2)),
        ("bert", "bert.encoder.layer.2.output.LayerNorm.gamma", ("norm", 2)),
        ("gpt_neox", "embed_out.weight", ("head", None)),
        ("llama", "layers.2.self_attn.q_proj.weight", ("attn.q", 2)),
        ("llama", "model.layers.2.self_attn.rotary_emb.inv_freq", None),
        ("t5", "decoder.block.1.layer.1.EncDecAttention.q.weight", ("attn.cross_q", 1)),
        ("t5", "decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", ("position", None)),
    ],
)
def test_role_reads_names_of_checkpoints(model_type, name, expected):
    assert anatomy_of(model_type).role(name) == expected


def test_neox_parts_go_head_by_head():
    model = tiny("gpt_neox")
    fused = next(site for site in anatomy_of(model).sites(model) if site.role == "attn.qkv")
    first = (Part("attn.q", 0, 8), Part("attn.k", 8, 16), Part("attn.v", 16, 24))
    assert fused.parts[:4] == (*first, Part("attn.q", 24, 32))


def test_parts_of_grouped_queries_are_of_unequal_size():
    model = tiny("phi3")
    fused = next(site for site in anatomy_of(model).sites(model) if site.role == "attn.qkv")
    assert fused.parts == (Part("attn.q", 0, 64), Part("attn.k", 64, 96), Part("attn.v", 96, 128))


def test_stages_follow_the_inputs_of_a_block():
    llama = anatomy_of("llama")
    assert llama.stages(["mlp.down", "attn.o", "mlp.up", "attn.v", "attn.q", "mlp.gate", "attn.k"]) == [
        ["attn.q", "attn.k", "attn.v"],
        ["attn.o"],
        ["mlp.gate", "mlp.up"],
        ["mlp.down"],
    ]
    assert llama.stages(["conv", "linear"]) == [["conv"], ["linear"]]


def test_families_are_found_by_their_files_and_share_no_type():
    types = [model_type for family in families() for model_type in family.types]
    assert len(types) == len(set(types))
    assert set(MODELS) <= set(types)


@pytest.mark.parametrize("name", MODULES)
def test_generic_anatomy_names_linears_convolutions_and_the_head(name):
    model = tiny(name)
    sites = anatomy_of(model).sites(model)
    assert [site.role for site in sites] == {
        "cnn": ["conv", "conv", "conv", "head"],
        "mlp": ["linear", "linear", "head"],
    }[name]
    assert anatomy_of(model).blocks(model) is None


def test_generic_anatomy_finds_blocks_of_one_type():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(4, 4)

    model = nn.ModuleDict({"table": nn.Embedding(9, 4), "body": nn.Sequential(Block(), Block(), Block()), "out": nn.Linear(4, 9)})
    anatomy = anatomy_of(model)
    assert anatomy.blocks(model) == "body"
    assert [(site.role, site.depth, site.depths) for site in anatomy.sites(model)] == [
        ("embed", None, 0),
        ("linear", 0, 3),
        ("linear", 1, 3),
        ("linear", 2, 3),
        ("head", None, 0),
    ]
    assert anatomy_of(nn.Linear(3, 3)).sites(nn.Linear(3, 3))[0].role == "linear"


def test_generic_anatomy_of_a_config_knows_no_name():
    assert anatomy_of({"model_type": "unheard"}).role("layers.0.fc.weight") is None


def test_sites_are_found_on_meta():
    from transformers import AutoModelForCausalLM

    real = tiny("qwen3")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(real.config)
    assert anatomy_of(model).sites(model) == anatomy_of(real).sites(real)


@pytest.mark.parametrize(
    ("pattern", "role", "depth", "expected"),
    [
        ("attn", "attn.q", 0, True),
        ("attn", "attn.cross_q", 0, True),
        ("attn.*", "attn.qkv", 0, True),
        ("attn.{q,v}", "attn.v", 0, True),
        ("attn.{q, v}", "attn.k", 0, False),
        ("mlp", "experts.up", 0, False),
        ("experts", "experts.up", 0, True),
        ("mlp.down", "mlp.down", 0, True),
        ("*.down", "experts.down", 0, True),
        ("head", "head", None, True),
        ("head", "head.pool", None, True),
        ("router", "router.shared", 1, True),
        ("block 3", "mlp.up", 3, True),
        ("block 3", "mlp.up", 4, False),
        ("blocks 2-5", "attn.q", 5, True),
        ("blocks 2-5", "attn.q", 6, False),
        ("blocks 2-5", "head", None, False),
        (["mlp.up", "head"], "head", None, True),
        ([], "head", None, False),
        ("linear", "linear", None, True),
    ],
)
def test_where_language(pattern, role, depth, expected):
    assert matches(role, depth, pattern) is expected


@pytest.mark.parametrize(("word", "near"), [("atn", "attn"), ("mlp.dwon", "mlp.down"), ("heads", "head"), ("blok 3", "block")])
def test_an_unknown_word_is_refused_with_the_nearest(word, near):
    with pytest.raises(SiteError, match=f"{word}.*Did you mean '{near}"):
        matches("attn.q", 0, word)


def test_roles_are_listed():
    assert {"attn.q", "mlp.down", "experts.gate_up", "linear", "conv", "head", "norm", "embed"} <= set(roles())


def test_anatomy_loads_without_torch():
    code = "import sys, modelwright.anatomy as a; a.matches('attn.q', 0, 'attn'); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("llama", [("input_layernorm", "self_attn"), ("post_attention_layernorm", "mlp")]),
        ("gpt2", [("ln_1", "attn"), ("ln_2", "mlp")]),
        ("vit", [("layernorm_before", "attention"), ("layernorm_after", "mlp")]),
        ("qwen3_moe", [("input_layernorm", "self_attn"), ("post_attention_layernorm", "mlp")]),
    ],
)
def test_the_ways_of_a_block_are_its_parts_with_the_norm_before_each(name, found):
    module = tiny(name)
    assert anatomy_of(module).ways(module) == dict.fromkeys(range(4), found)


@pytest.mark.parametrize("name", ["olmo2", "gemma2", "phi", "opt", "bert", "t5"])
def test_blocks_that_are_no_sum_of_parts_behind_a_norm_have_no_ways(name):
    module = tiny(name)
    with pytest.raises(SiteError, match=r"laid out otherwise|no single row"):
        anatomy_of(module).ways(module)

"""What is taken out is gone, what stays computes as if the rest were zero, and the result loads anywhere."""

import copy
import itertools

import pytest
import torch
from tiny import CAUSAL, MODELS, outputs, tiny, tiny_inputs

import modelwright as mw
from modelwright.anatomy import anatomy_of
from modelwright.anatomy.removal import remove_blocks, remove_units
from modelwright.core.errors import PlanError, SiteError
from modelwright.core.model import Model

UNITS = [
    ("mlp", ["llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi", "phi3", "olmo2", "gpt2"]),
    ("mlp", ["gpt_neox", "opt", "bert", "t5", "vit", "clip"]),
    ("heads", ["llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi", "phi3", "mixtral"]),
    ("heads", ["qwen2_moe", "qwen3_moe", "t5", "vit"]),
    ("residual", ["llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3", "olmo2", "mixtral"]),
    ("residual", ["qwen2_moe", "qwen3_moe", "t5"]),
]
PLAIN = [(kind, name) for kind, names in UNITS for name in names]
IN_MEMORY = [("heads", name) for name in ("gpt2", "gpt_neox", "opt", "bert", "clip")] + [("residual", "olmoe")]
KEEP = {
    "mlp": [n for n in range(160) if n % 5 not in (1, 2)],
    "heads": [1, 3],
    "residual": [n for n in range(64) if n % 4 != 2],
}


def keep_of(model, kind):
    count = anatomy_of(model).units(model, kind)[0].count
    return [1, 2, 4, 7] if kind == "heads" and count == 8 else KEEP[kind]


def silenced(model, kind, keep):
    """A copy of the model with zeros on the output side of all units but `keep`."""
    model = copy.deepcopy(model)
    tensors = dict(model.named_parameters())
    for group in anatomy_of(model).groups(model, kind):
        for part in group.slices:
            if part.output and group.index not in keep:
                tensors[part.name].data.narrow(part.dim, part.start, part.stop - part.start).zero_()
    return model


def generated(model):
    """Three tokens after the first row, with and without the cache."""
    ids = tiny_inputs(model)["input_ids"][:1]
    settings = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 3, "do_sample": False}
    return [model.generate(ids, use_cache=cache, **settings) for cache in (True, False)]


def reload(model, path):
    model.save_pretrained(path)
    return type(model).from_pretrained(path).eval()


@pytest.mark.parametrize(("kind", "name"), PLAIN + IN_MEMORY)
def test_removing_equals_silencing(kind, name):
    model = tiny(name)
    keep = keep_of(model, kind)
    expected, before = outputs(silenced(model, kind, keep)), outputs(model)
    record = remove_units(model, kind, keep, plain=(kind, name) in PLAIN)
    assert set(record.after) == {len(keep)}
    assert (outputs(model) - expected).abs().max() < 1e-5
    assert (before - expected).abs().max() > 1e-3


@pytest.mark.parametrize(("kind", "name"), PLAIN)
def test_removed_loads_in_plain_transformers(kind, name, tmp_path):
    model = tiny(name)
    record = remove_units(model, kind, keep_of(model, kind))
    assert record.plain
    loaded = reload(model, tmp_path)
    assert torch.equal(outputs(loaded), outputs(model))
    for key, weight in loaded.named_parameters():
        assert torch.equal(weight, model.get_parameter(key))


@pytest.mark.parametrize(("kind", "name"), IN_MEMORY)
def test_what_no_config_can_say_is_refused_and_changes_nothing(kind, name):
    model = tiny(name)
    before = outputs(model)
    with pytest.raises(PlanError, match="plain=False"):
        remove_units(model, kind, keep_of(model, kind))
    assert torch.equal(outputs(model), before)


@pytest.mark.parametrize("kind", ["mlp", "heads", "residual"])
@pytest.mark.parametrize("name", ["llama", "gemma", "qwen2"])
@pytest.mark.parametrize("tie", [True, False])
def test_tied_and_untied_heads_both_follow(kind, name, tie, tmp_path):
    model = tiny(name, tie_word_embeddings=tie)
    expected = outputs(silenced(model, kind, KEEP[kind])) if not (tie and kind == "residual") else None
    remove_units(model, kind, KEEP[kind])
    if expected is not None:
        assert (outputs(model) - expected).abs().max() < 1e-5
    tied = anatomy_of(model).tied(model)
    assert bool(tied) == tie
    assert torch.equal(outputs(reload(model, tmp_path)), outputs(model))


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3", "t5", "bert"])
def test_blocks_may_keep_different_neurons_of_one_width(name, tmp_path):
    model = tiny(name)
    units = anatomy_of(model).units(model, "mlp")
    generator = torch.Generator().manual_seed(0)
    keep = [torch.randperm(160, generator=generator)[:96].tolist() for _ in units]
    expected = copy.deepcopy(model)
    for each, rows in zip(units, keep, strict=True):
        for span in each.spans:
            if span.output:
                gone = [n for n in range(160) if n not in rows]
                expected.get_parameter(span.name).data.index_fill_(span.dim, torch.tensor(gone), 0)
    assert remove_units(model, "mlp", keep).plain
    assert (outputs(model) - outputs(expected)).abs().max() < 1e-5
    assert torch.equal(outputs(reload(model, tmp_path)), outputs(model))


def test_widths_that_differ_stay_in_memory_and_are_recorded():
    model = tiny()
    keep = {0: range(40), 2: range(100)}
    with pytest.raises(PlanError, match="differ between blocks"):
        remove_units(model, "mlp", keep)
    record = remove_units(model, "mlp", keep, plain=False)
    assert record.after == (40, 160, 100, 160)
    assert not record.plain
    assert outputs(model).isfinite().all()


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2", "gpt2", "bert"])
def test_head_counts_may_differ_in_memory(name):
    model = tiny(name)
    expected = copy.deepcopy(model)
    units = anatomy_of(model).units(model, "heads")
    for span in units[1].spans:
        if span.output:
            expected.get_parameter(span.name).data.narrow(span.dim, 0, span.width).zero_()
    remove_units(model, "heads", {1: range(1, units[1].count)}, plain=False)
    assert (outputs(model) - outputs(expected)).abs().max() < 1e-5


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2", "gpt2", "bert", "phi3", "mixtral"])
def test_sizes_that_no_config_can_say_load_with_the_package(name, tmp_path):
    model = Model(name=name, module=tiny(name))
    module, units = model.module, anatomy_of(model.module).units
    remove_units(module, "heads", {1: range(1, units(module, "heads")[1].count)}, plain=False)
    if name != "mixtral":
        remove_units(module, "mlp", {0: range(40), 2: range(100)}, plain=False)
    remove_blocks(module, [1 if name == "gpt2" else 3])
    model.save(tmp_path / "out")
    loaded = type(module).from_pretrained(tmp_path / "out").eval()
    assert torch.equal(outputs(loaded), outputs(module))
    assert {key: value.shape for key, value in loaded.named_parameters()} == {key: value.shape for key, value in module.named_parameters()}
    if name in CAUSAL:
        for one, other in zip(generated(loaded), generated(module), strict=True):
            assert torch.equal(one, other)
    opened = mw.open(tmp_path / "out")
    opened.save(tmp_path / "again")
    assert torch.equal(outputs(mw.open(tmp_path / "again").module), outputs(module))


def test_a_head_count_that_the_config_refuses_is_answered_with_counts_that_load():
    model = tiny("llama")  # 64 channels: 3 of 4 groups leave 6 query heads, and 64 is no multiple of 6
    with pytest.raises(PlanError, match=r"Counts that load: 1, 2\."):
        remove_units(model, "heads", [0, 1, 2])
    with pytest.raises(PlanError, match=r"Counts that load: .*48"):
        remove_units(model, "residual", range(51))
    assert remove_units(tiny("mistral"), "heads", [0, 1, 2]).plain


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe"])
def test_removing_experts_equals_never_choosing_them(name, tmp_path):
    model, keep = tiny(name), [0, 2, 3, 6, 7]
    barred = copy.deepcopy(model)
    for layer in barred.model.layers:
        if hasattr(layer.mlp, "experts"):
            _bar(layer.mlp.gate, [1, 4, 5], getattr(layer.mlp.gate, "norm_topk_prob", True))
    remove_units(model, "experts", keep)
    assert (outputs(model) - outputs(barred)).abs().max() < 1e-5
    assert torch.equal(outputs(reload(model, tmp_path)), outputs(model))


def _bar(router, gone, normed):
    def forward(hidden):
        logits = (hidden.reshape(-1, hidden.shape[-1]) @ router.weight.T).index_fill(1, torch.tensor(gone), -torch.inf)
        scores, chosen = logits.softmax(-1).topk(router.top_k)
        return logits, scores / scores.sum(-1, keepdim=True) if normed else scores, chosen

    router.forward = forward


def test_fewer_experts_than_a_token_needs_are_refused():
    with pytest.raises(PlanError, match="each token goes to 2 experts; 1 would stay"):
        remove_units(tiny("mixtral"), "experts", [3])


def identity_block(model, stack, index):
    """Make a block add nothing to its input."""
    anatomy = anatomy_of(model)
    prefix = f"{stack}.{index}."
    for name, weight in model.named_parameters():
        role = anatomy.role(name)[0]
        if name.startswith(prefix) and role in ("attn.o", "attn.cross_o", "mlp.down", "experts.down"):
            weight.data.zero_()


STACKS = [(name, None) for name in MODELS if name not in ("t5", "clip", "bert")] + [
    ("t5", "encoder.block"),
    ("t5", "decoder.block"),
    ("clip", "text_model.encoder.layers"),
    ("clip", "vision_model.encoder.layers"),
]


@pytest.mark.parametrize("drop", [[1], [0, 2]])
@pytest.mark.parametrize(("name", "stack"), STACKS)
def test_removing_a_block_that_adds_nothing_changes_nothing(name, stack, drop, tmp_path):
    model = tiny(name)
    path = stack or anatomy_of(model).blocks(model)
    for index in drop:
        identity_block(model, path, index)
    expected = outputs(model)
    record = remove_blocks(model, drop, stack)
    assert (record.before, record.after) == ((4,), (4 - len(drop),))
    assert (outputs(model) - expected).abs().max() < 1e-5
    assert torch.equal(outputs(reload(model, tmp_path)), outputs(model))


def test_blocks_of_bert_leave_in_order(tmp_path):
    model = tiny("bert")
    kept = [list(layer.parameters()) for n, layer in enumerate(model.bert.encoder.layer) if n != 1]
    remove_blocks(model, [1])
    for layer, weights in zip(model.bert.encoder.layer, kept, strict=True):
        assert all(a is b for a, b in zip(layer.parameters(), weights, strict=True))
    assert torch.equal(outputs(reload(model, tmp_path)), outputs(model))


@pytest.mark.parametrize("name", [*CAUSAL, "t5"])
def test_generation_with_a_cache_equals_the_whole_forward_after_removal(name):
    model = tiny(name)
    remove_blocks(model, [1, 2], "decoder.block" if name == "t5" else None)
    with_cache, without = generated(model)
    assert with_cache.shape[1] == (4 if name == "t5" else 15)
    assert torch.equal(with_cache, without)


@pytest.mark.parametrize(("name", "kind"), list(itertools.product(["llama", "qwen3", "gemma2", "phi3"], KEEP)))
def test_generation_works_after_units_left(name, kind):
    model = tiny(name)
    remove_units(model, kind, KEEP[kind])
    with_cache, without = generated(model)
    assert torch.equal(with_cache, without)


def test_layer_types_are_those_of_the_kept_blocks():
    near, far = "sliding_attention", "full_attention"
    model = tiny("gemma3_text", layer_types=[near, far, far, near])
    remove_blocks(model, [0])
    assert model.config.layer_types == [far, far, near]
    assert [layer.self_attn.layer_idx for layer in model.model.layers] == [0, 1, 2]
    assert model.config.num_hidden_layers == 3


def test_plain_mlp_blocks_of_a_mixture_are_counted_anew():
    model = tiny("qwen2_moe", mlp_only_layers=[], decoder_sparse_step=2)  # experts in blocks 1 and 3
    remove_blocks(model, [0])
    assert model.config.mlp_only_layers == [1]
    assert [hasattr(layer.mlp, "experts") for layer in model.model.layers] == [True, False, True]


def test_the_first_block_of_t5_hands_its_positions_on():
    model = tiny("t5")
    table = model.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight
    remove_blocks(model, [0, 1], "encoder.block")
    assert model.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight is table
    assert (model.config.num_layers, model.config.num_decoder_layers) == (2, 4)


@pytest.mark.parametrize(
    ("act", "error", "text"),
    [
        (lambda m: remove_blocks(m, [4]), SiteError, "no block 4.*0 to 3"),
        (lambda m: remove_blocks(m, range(4)), PlanError, "all 4 blocks"),
        (lambda m: remove_blocks(m, [0], "encoder"), SiteError, "it has model.layers"),
        (lambda m: remove_units(m, "neurons", [0]), SiteError, "kinds are mlp"),
        (lambda m: remove_units(m, "experts", [0]), SiteError, "has no experts"),
        (lambda m: remove_units(m, "mlp", [160]), SiteError, "there is no 160"),
        (lambda m: remove_units(m, "mlp", []), SiteError, "none would stay"),
        (lambda m: remove_units(m, "mlp", [[0], [1]]), SiteError, "2 lists.*4 places"),
        (lambda m: remove_units(m, "mlp", {7: [0]}), SiteError, r"blocks \[7\]"),
    ],
)
def test_impossible_removals_say_why(act, error, text):
    model = tiny()
    before = outputs(model)
    with pytest.raises(error, match=text):
        act(model)
    assert torch.equal(outputs(model), before)


@pytest.mark.parametrize(("name", "kind"), [("gpt2", "residual"), ("olmo2", "heads"), ("cnn", "mlp")])
def test_units_that_cannot_leave_exactly_are_refused_with_the_reason(name, kind):
    with pytest.raises(SiteError, match="cannot lose"):
        remove_units(tiny(name), kind, [0])


def test_a_model_with_two_stacks_asks_which():
    with pytest.raises(SiteError, match=r"encoder.block, decoder.block"):
        remove_blocks(tiny("t5"), [0])


def test_keeping_all_changes_no_bit():
    model = tiny()
    before, config = outputs(model), model.config.to_dict()
    for kind, count in (("mlp", 160), ("heads", 4), ("residual", 64)):
        remove_units(model, kind, range(count))
    remove_blocks(model, [])
    assert torch.equal(outputs(model), before)
    assert model.config.to_dict() == config


@pytest.mark.parametrize("kind", ["mlp", "heads", "residual"])
def test_units_of_layers_that_are_no_whole_matrices_are_refused(kind):
    model = tiny()
    model.model.layers[1].self_attn.o_proj = torch.nn.Sequential(torch.nn.Linear(64, 4), torch.nn.Linear(4, 64))
    with pytest.raises(SiteError, match=r"layers\.1\.self_attn\.o_proj is a Sequential: remove first"):
        remove_units(model, kind, KEEP[kind])


def test_removals_compose(tmp_path):
    model = tiny("qwen3")
    remove_blocks(model, [2])
    for kind, keep in KEEP.items():
        remove_units(model, kind, keep)
    assert model.config.hidden_size == 48
    assert torch.equal(outputs(reload(model, tmp_path)), outputs(model))


def test_groups_of_units_agree_with_rows():
    model = tiny("phi3")
    for kind in ("mlp", "heads"):
        for units in anatomy_of(model).units(model, kind):
            for span in units.spans:
                weight = model.get_parameter(span.name)
                rows = units.rows(span, weight)
                assert rows.shape[0] == units.count
                part = weight.narrow(span.dim, span.start + span.width, span.width).movedim(span.dim, 0)
                assert torch.equal(rows[1], part.reshape(-1))


def test_removal_keeps_dtype_and_grad_flags():
    model = tiny().to(torch.bfloat16)
    model.model.layers[0].mlp.requires_grad_(False)
    remove_units(model, "mlp", range(32))
    assert model.model.layers[0].mlp.down_proj.weight.dtype == torch.bfloat16
    assert not model.model.layers[0].mlp.down_proj.weight.requires_grad
    assert model.model.layers[1].mlp.down_proj.weight.requires_grad


def test_removal_works_on_meta():
    real, model = tiny(), tiny().to("meta")
    for each in (real, model):
        remove_blocks(each, [0])
        remove_units(each, "heads", [1, 2])
        remove_units(each, "residual", KEEP["residual"])
    assert [p.shape for p in model.parameters()] == [p.shape for p in real.parameters()]

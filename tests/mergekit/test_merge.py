"""Configurations run: every tensor is what the configuration says, and what cannot be is said before anything is written."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import outputs, tiny

import modelwright as mw
from modelwright.core.errors import MethodError, ModelError, ModelwrightError, RecipeError, SettingError, WeightsError
from modelwright.core.model import Model, quiet
from modelwright.core.weights import HUB_FILES, Checkpoint, Writer
from modelwright.mergekit.plan import belongs, placed, stacks
from modelwright.mergekit.run import MARKER
from modelwright.methods.adapt.lora import Lora
from modelwright.methods.merge.nuslerp import Nuslerp
from modelwright.methods.merge.ties import Ties

UP = "model.layers.{}.mlp.up_proj.weight"
Q = "model.layers.{}.self_attn.q_proj.weight"
EMBED, NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"


def same(one: Checkpoint, folder: Path) -> bool:
    other = Checkpoint(folder)
    return set(one.names) == set(other.names) and all(torch.equal(one.read(name), other.read(name)) for name in one.names)


@pytest.mark.parametrize(
    "text",
    [
        "merge_method: passthrough\nmodels: [{model: a}]",
        "merge_method: linear\nmodels: [{model: a, parameters: {weight: 1}}]",
        "merge_method: linear\nmodels: [{model: a, parameters: {weight: 3}}]",
        "merge_method: linear\nmodels: [{model: a, parameters: {weight: 1}}, {model: b, parameters: {weight: 0}}]",
        "merge_method: linear\nmodels: [{model: a, parameters: {weight: 1}}]\ndtype: float32",
    ],
)
def test_one_model_comes_back_bit_for_bit(merge, folders, text):
    assert same(merge(text), folders["a"])


@pytest.mark.parametrize("method", ["passthrough", "linear"])
@pytest.mark.parametrize("key", ["dtype", "out_dtype"])
def test_one_model_in_another_dtype_is_rounded_to_it(merge, folders, method, key):
    merged = merge(f"merge_method: {method}\nmodels: [{{model: a, parameters: {{weight: 1}}}}]\n{key}: bfloat16")
    one = Checkpoint(folders["a"])
    assert set(merged.names) == set(one.names)
    for name in one.names:
        assert merged.dtype(name) == torch.bfloat16
        assert torch.equal(merged.read(name), one.read(name).bfloat16()), name


def test_task_arithmetic_of_weight_one_is_the_model_to_rounding(merge, read):
    merged = merge("merge_method: task_arithmetic\nbase_model: b\nmodels: [{model: a, parameters: {weight: 1}}]")
    for name in merged.names:
        assert torch.allclose(merged.read(name), read("a", name), atol=1e-6), name


def test_filters_and_gradients_decide_each_tensors_weight(merge, read):
    """By hand: t = 0, 1/3, 2/3, 1 over four layers; embedding, norm and head at t = 0."""
    merged = merge("""
merge_method: task_arithmetic
base_model: c
models:
  - model: a
    parameters:
      weight:
        - {filter: self_attn, value: [0, 0.5, 1]}
        - {filter: mlp, value: [1, 0]}
        - value: [0.3, 0.9]
""")

    def share(name):
        change, whole = merged.read(name) - read("c", name), read("a", name) - read("c", name)
        return float((change * whole).sum() / (whole * whole).sum())

    for depth in range(4):
        assert share(Q.format(depth)) == pytest.approx(depth / 3, abs=1e-5)
        assert share(UP.format(depth)) == pytest.approx(1 - depth / 3, abs=1e-5)
        assert share(f"model.layers.{depth}.input_layernorm.weight") == pytest.approx(0.3 + 0.6 * depth / 3, abs=1e-5)
    for name in (EMBED, NORM, HEAD):
        assert share(name) == pytest.approx(0.3, abs=1e-5)


def test_inner_scopes_come_before_outer_ones_and_filters_that_miss_fall_through(merge, read):
    merged = merge("""
merge_method: linear
slices:
  - sources:
      - {model: a, layer_range: [0, 2], parameters: {weight: {filter: mlp, value: 0}}}
      - {model: b, layer_range: [0, 2]}
    parameters: {weight: {filter: "*", value: 2}}
  - sources:
      - {model: a, layer_range: [2, 4], parameters: {weight: 3}}
      - {model: b, layer_range: [2, 4]}
parameters: {weight: 1}
""")
    assert torch.equal(merged.read(UP.format(0)), read("b", UP.format(0)))
    assert torch.allclose(merged.read(Q.format(0)), (read("a", Q.format(0)) + read("b", Q.format(0))) / 2, atol=1e-6)
    assert torch.allclose(merged.read(Q.format(2)), (3 * read("a", Q.format(2)) + read("b", Q.format(2))) / 4, atol=1e-6)


def test_scopes_go_from_the_model_to_its_slice_its_module_and_the_whole(merge, folders):
    """Each tensor of the decoder has the weight of the innermost scope that names it; the encoder that of its own."""
    merged = merge("""
merge_method: linear
modules:
  encoder:
    models: [{model: t5-1}, {model: t5-2}]
    parameters: {weight: 1}
  decoder:
    slices:
      - sources:
          - {model: t5-1, layer_range: [0, 4], parameters: {weight: {filter: DenseReluDense.wi_0, value: 7}}}
          - {model: t5-2, layer_range: [0, 4]}
        parameters: {weight: {filter: DenseReluDense, value: 1}}
    parameters: {weight: [{filter: SelfAttention, value: 1}, {filter: DenseReluDense, value: 0}]}
  shared: {models: [{model: t5-1}, {model: t5-2}]}
parameters: {weight: 3, normalize: false}
""")
    one, two = Checkpoint(folders["t5-1"]), Checkpoint(folders["t5-2"])
    inside = "decoder.block.1.layer."
    for name, shares in (
        (inside + "2.DenseReluDense.wi_0.weight", (7, 1)),
        (inside + "2.DenseReluDense.wo.weight", (1, 1)),
        (inside + "0.SelfAttention.q.weight", (1, 1)),
        (inside + "1.EncDecAttention.q.weight", (3, 3)),
        ("encoder.block.1.layer.0.SelfAttention.q.weight", (1, 1)),
        ("shared.weight", (3, 3)),
    ):
        assert torch.allclose(merged.read(name), shares[0] * one.read(name) + shares[1] * two.read(name), atol=1e-5), name


def test_a_models_parameters_go_by_its_own_names_and_those_of_the_whole_by_the_results(merge, read):
    """Layer 3 of a becomes layer 1: its own scale is found under 3, and t of a slerp under 1."""
    merged = merge("""
merge_method: passthrough
slices:
  - sources: [{model: b, layer_range: [0, 1]}]
  - sources: [{model: a, layer_range: [3, 4], parameters: {scale: [{filter: layers.3., value: 2}, {filter: layers.1., value: 5}]}}]
""")
    assert torch.equal(merged.read(UP.format(1)), 2 * read("a", UP.format(3)))
    merged = merge("""
merge_method: slerp
base_model: b
slices:
  - sources: [{model: b, layer_range: [0, 1]}, {model: a, layer_range: [0, 1]}]
    parameters: {t: 0}
  - sources: [{model: b, layer_range: [3, 4]}, {model: a, layer_range: [3, 4]}]
    parameters: {t: [{filter: layers.3., value: 0}, {filter: layers.1., value: 1}]}
parameters: {t: 0}
""", "slerp")  # fmt: skip
    assert torch.equal(merged.read(UP.format(0)), read("b", UP.format(0)))
    assert torch.equal(merged.read(UP.format(1)), read("a", UP.format(3)))
    assert torch.equal(merged.read(NORM), read("b", NORM))  # the last slice's filters miss it, and the whole's t is 0


def test_a_slice_may_have_a_base_of_its_own(merge, read):
    merged = merge("""
merge_method: slerp
base_model: a
slices:
  - sources: [{model: a, layer_range: [0, 2]}, {model: b, layer_range: [0, 2]}]
  - sources: [{model: a, layer_range: [2, 4]}, {model: b, layer_range: [2, 4]}]
    base_model: b
parameters: {t: 0}
""")
    for depth, model in ((0, "a"), (1, "a"), (2, "b"), (3, "b")):
        assert torch.equal(merged.read(UP.format(depth)), read(model, UP.format(depth)))
    assert torch.equal(merged.read(EMBED), read("a", EMBED))
    assert torch.equal(merged.read(HEAD), read("b", HEAD))


def test_a_gradient_over_slices_begins_anew_in_each(merge, read):
    merged = merge("""
merge_method: passthrough
slices:
  - sources: [{model: a, layer_range: [0, 3], parameters: {scale: [1, 2]}}]
  - sources: [{model: a, layer_range: [1, 3], parameters: {scale: [1, 2]}}]
""")
    for new, old, scale in ((0, 0, 1.0), (1, 1, 1.5), (2, 2, 2.0), (3, 1, 1.0), (4, 2, 2.0)):
        assert torch.equal(merged.read(UP.format(new)), scale * read("a", UP.format(old)))
    assert torch.equal(merged.read(EMBED), read("a", EMBED))
    assert torch.equal(merged.read(HEAD), read("a", HEAD))


def test_twenty_four_and_twenty_layers_make_forty_four(merge, tmp_path):
    """[0, 24) and [20, 40) of forty layers."""
    Model(name="deep", module=tiny("llama", num_hidden_layers=40, hidden_size=32, intermediate_size=16)).save(tmp_path / "deep")
    merged = merge(f"""
merge_method: passthrough
slices:
  - sources: [{{model: {tmp_path}/deep, layer_range: [0, 24]}}]
  - sources: [{{model: {tmp_path}/deep, layer_range: [20, 40]}}]
""")
    deep = Checkpoint(tmp_path / "deep")
    assert merged.config["num_hidden_layers"] == 44
    assert {int(name.split(".")[2]) for name in merged.names if ".layers." in name} == set(range(44))
    for new in range(44):
        assert torch.equal(merged.read(UP.format(new)), deep.read(UP.format(new if new < 24 else new - 4)))
    assert outputs(merged.model.module).isfinite().all()


def test_lists_of_blocks_are_numbered_without_holes_and_hold_more_than_one_tensor():
    names = ["a.0.x", "a.0.y", "a.1.x", "a.1.y", "book.0.code", "book.1.code", "b.0.x", "b.0.y", "b.2.x", "b.2.y", "head.weight"]
    assert stacks(placed(name) for name in names) == {"a.": 2}
    assert placed("model.layers.12.mlp.experts.3.up.weight") == ("model.layers.", 12, "mlp.experts.3.up.weight")
    assert placed("lm_head.weight") is None


def test_a_frankenmerge_has_its_layers_numbered_anew(merge, read, tmp_path):
    merged = merge("""
merge_method: passthrough
slices:
  - sources: [{model: a, layer_range: [0, 3]}]
  - sources: [{model: b, layer_range: [1, 4]}]
""")
    for new, (model, old) in enumerate([("a", 0), ("a", 1), ("a", 2), ("b", 1), ("b", 2), ("b", 3)]):
        for name in (UP, Q):
            assert torch.equal(merged.read(name.format(new)), read(model, name.format(old)))
    assert torch.equal(merged.read(EMBED), read("a", EMBED))
    assert torch.equal(merged.read(HEAD), read("b", HEAD))
    assert torch.equal(merged.read(NORM), read("b", NORM))
    assert merged.config["num_hidden_layers"] == 6
    assert outputs(merged.model.module).isfinite().all()


def test_a_gradient_runs_over_its_slice_and_of_one_layer_ends(merge, read):
    merged = merge("""
merge_method: linear
slices:
  - sources: [{model: a, layer_range: [0, 3]}, {model: b, layer_range: [1, 4]}]
    parameters: {weight: 1}
  - sources: [{model: b, layer_range: [3, 4], parameters: {weight: [0, 1]}}, {model: c, layer_range: [0, 1], parameters: {weight: [1, 0]}}]
""")
    assert torch.allclose(merged.read(UP.format(1)), (read("a", UP.format(1)) + read("b", UP.format(2))) / 2, atol=1e-6)
    assert torch.equal(merged.read(UP.format(3)), read("b", UP.format(3)))  # t = 1 where a slice has one layer
    assert torch.equal(merged.read(HEAD), read("c", HEAD))  # t = 0 outside the layers
    assert merged.config["num_hidden_layers"] == 4


def test_what_the_config_says_of_each_layer_moves_with_it(merge):
    merged = merge("""
merge_method: passthrough
slices:
  - sources: [{model: qwen2, layer_range: [0, 2]}]
  - sources: [{model: qwen2, layer_range: [1, 4]}]
""")
    assert merged.config["layer_types"] == [f"{word}_attention" for word in ("full", "sliding", "sliding", "full", "sliding")]
    assert outputs(merged.model.module).isfinite().all()


def test_modules_have_layers_of_their_own(merge, folders):
    merged = merge("""
merge_method: linear
modules:
  encoder: {models: [{model: t5-1, parameters: {weight: 1}}, {model: t5-2, parameters: {weight: 1}}]}
  decoder:
    slices:
      - sources: [{model: t5-1, layer_range: [0, 3]}]
      - sources: [{model: t5-2, layer_range: [2, 4]}]
  shared: {models: [{model: t5-2}]}
parameters: {weight: 1}
""")
    one, two = Checkpoint(folders["t5-1"]), Checkpoint(folders["t5-2"])
    name = "encoder.block.1.layer.0.SelfAttention.q.weight"
    assert torch.allclose(merged.read(name), (one.read(name) + two.read(name)) / 2, atol=1e-6)
    inside = "decoder.block.{}.layer.2.DenseReluDense.wo.weight"
    assert torch.equal(merged.read(inside.format(4)), two.read(inside.format(3)))
    assert torch.equal(merged.read("shared.weight"), two.read("shared.weight"))
    assert (merged.config["num_layers"], merged.config["num_decoder_layers"]) == (4, 5)


PARTS = ["text_decoder", "multi_modal_projector", "vision_tower"]


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("model.layers.0.self_attn.q_proj.weight", 0),
        ("lm_head.weight", 0),
        ("model.language_model.layers.0.mlp.up_proj.weight", 0),
        ("language_model.model.embed_tokens.weight", 0),
        ("multi_modal_projector.linear_1.weight", 1),
        ("model.multi_modal_projector.linear_1.weight", 1),
        ("visual.merger.mlp.0.weight", 1),
        ("visual.blocks.0.attn.qkv.weight", 2),
        ("model.visual.patch_embed.proj.weight", 2),
        ("vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight", 2),
    ],
)
def test_each_tensor_of_a_model_that_sees_belongs_to_one_module(name, part):
    assert [belongs(name, word, PARTS) for word in PARTS] == [number == part for number in range(3)]
    assert belongs(name, "vision_tower", ["text_decoder", "vision_tower"]) == (part == 2 or name.startswith("visual."))


def test_slices_of_a_model_with_two_stacks_ask_for_modules(merge):
    with pytest.raises(RecipeError, match="Give each its own entry of `modules:`"):
        merge("merge_method: passthrough\nslices: [{sources: [{model: t5-1, layer_range: [0, 1]}]}]")
    with pytest.raises(RecipeError, match="no part 'encodr'. Did you mean 'encoder'"):
        merge("merge_method: passthrough\nmodules: {encodr: {models: [{model: t5-1}]}}")
    with pytest.raises(RecipeError, match="tensors belong to none of encoder"):
        merge("merge_method: passthrough\nmodules: {encoder: {models: [{model: t5-1}]}}")


def test_it_is_the_method_of_a_recipe(merge, folders, tmp_path):
    """The same settings give the same bits, whichever way they come."""
    merged = merge("""
merge_method: ties
base_model: c
models: [{model: a, parameters: {weight: 0.6, density: 0.3}}, {model: b, parameters: {weight: 0.4, density: 0.7}}]
parameters: {lambda: 0.8}
""")
    method = Ties(weights=[0.6, 0.4], keep_each=[0.3, 0.7], scale=0.8)
    mw.apply(folders["c"], method, donors=[folders["a"], folders["b"]], save=tmp_path / "recipe")
    assert same(merged, tmp_path / "recipe")


def test_masks_depend_on_the_seed_alone(merge):
    text = "merge_method: dare_ties\nbase_model: c\nmodels: [{model: a, parameters: {weight: 1, density: 0.5}}]"
    one, two = merge(text, "one"), merge(text, "two")
    assert same(one, two.path)
    assert not same(one, merge(text, "three", seed=1).path)


def test_each_donor_of_breadcrumbs_may_lose_another_share(merge, read):
    merged = merge("""
merge_method: breadcrumbs
base_model: c
models: [{model: a, parameters: {weight: 1, density: 0.5, gamma: 0.5}}]
""")
    change, whole = merged.read(UP.format(0)) - read("c", UP.format(0)), read("a", UP.format(0)) - read("c", UP.format(0))
    small = whole.abs() < whole.abs().median()
    assert (change[~small] == 0).float().mean() > 0.99
    assert (change[small] != 0).float().mean() > 0.99


def test_dtypes_of_the_result(merge, read):
    config = "merge_method: linear\nmodels: [{model: a, parameters: {weight: 1}}, {model: b, parameters: {weight: 1}}]\n"
    exact = (read("a", EMBED).double() + read("b", EMBED).double()) / 2
    half = merge(config + "dtype: bfloat16", "half")
    assert torch.equal(half.read(EMBED), exact.to(torch.bfloat16))  # rounded once
    assert half.config["dtype"] == "bfloat16"
    assert merge(config + "dtype: float32\nout_dtype: torch.float16", "other").dtype(EMBED) == torch.float16
    theirs = merge(config + "dtype: bfloat16\nout_dtype: float32", "theirs", as_mergekit=True)
    rounded = (read("a", EMBED).bfloat16().double() + read("b", EMBED).bfloat16().double()) / 2
    assert torch.equal(theirs.read(EMBED), rounded.bfloat16().float())


def test_as_mergekit_takes_deltas_in_the_dtype_of_the_configuration(merge, read):
    merged = merge(
        "merge_method: task_arithmetic\nbase_model: c\nmodels: [{model: a, parameters: {weight: 1}}]\ndtype: bfloat16", as_mergekit=True
    )
    base, donor = read("c", EMBED).bfloat16(), read("a", EMBED).bfloat16()
    assert torch.equal(merged.read(EMBED), base + (donor - base))


def test_as_mergekit_brings_what_stays_to_its_sum_of_sizes(merge, read):
    text = "merge_method: dare_linear\nbase_model: c\nmodels: [{model: a, parameters: {weight: 1, density: 0.5}}]"
    whole = (read("a", EMBED) - read("c", EMBED)).abs().sum()
    theirs = (merge(text, "theirs", as_mergekit=True).read(EMBED) - read("c", EMBED)).abs().sum()
    ours = (merge(text, "ours").read(EMBED) - read("c", EMBED)).abs().sum()
    assert float(theirs) == pytest.approx(float(whole), rel=1e-5)
    assert float(ours) != pytest.approx(float(whole), rel=1e-5)


# Ties, shapes and what is missing


def test_one_tied_input_gives_its_embedding_for_the_head(merge, read):
    for order in (("a", "tied"), ("tied", "a")):
        one, two = order
        merged = merge(
            f"merge_method: linear\nmodels: [{{model: {one}, parameters: {{weight: 1}}}}, {{model: {two}, parameters: {{weight: 1}}}}]",
            one,
        )
        assert torch.allclose(merged.read(HEAD), (read("a", HEAD) + read("tied", EMBED)) / 2, atol=1e-6)
        assert merged.config["tie_word_embeddings"] is False
        assert torch.equal(merged.model.module.lm_head.weight, merged.read(HEAD))


def test_inputs_that_all_tie_stay_tied(merge):
    merged = merge("merge_method: linear\nmodels: [{model: tied, parameters: {weight: 1}}]\ndtype: float32")
    assert HEAD not in merged
    assert merged.config["tie_word_embeddings"] is True


def test_vocabularies_of_other_sizes_meet_in_the_rows_that_they_share(merge, read):
    both = "[{model: a, parameters: {weight: 1}}, {model: tall, parameters: {weight: 1}}]"
    for name in ("a", "tall"):
        text = f"merge_method: linear\nmodels: {both}\nbase_model: {name}"
        merged = merge(text, name)
        assert merged.shape(EMBED) == (97, 64)
        assert merged.config["vocab_size"] == 97
        assert torch.allclose(merged.read(EMBED), (read("a", EMBED) + read("tall", EMBED)[:97]) / 2, atol=1e-6)
        assert any("rows" in note for note in merged.notes)


def test_task_vectors_have_the_rows_of_the_base(merge, read):
    short = merge("merge_method: task_arithmetic\nbase_model: a\nmodels: [{model: tall, parameters: {weight: 1}}]", "short")
    assert torch.allclose(short.read(EMBED), read("tall", EMBED)[:97], atol=1e-6)
    tall = merge("""
merge_method: task_arithmetic
base_model: tall
models: [{model: a, parameters: {weight: 1}}]
""", "tall")  # fmt: skip
    assert torch.equal(tall.read(EMBED), read("tall", EMBED))
    assert torch.allclose(tall.read(Q.format(0)), read("a", Q.format(0)), atol=1e-6)
    assert any("a has 97 rows and the base 105; the model is left out here" in note for note in tall.notes)


def test_only_the_models_with_fewer_rows_than_the_base_are_left_out(merge, read):
    merged = merge("""
merge_method: task_arithmetic
base_model: a
models: [{model: b, parameters: {weight: 0.5}}, {model: tall, parameters: {weight: 0.25}}]
""")
    base = read("a", EMBED)
    expected = base + 0.5 * (read("b", EMBED) - base) + 0.25 * (read("tall", EMBED)[:97] - base)
    assert torch.allclose(merged.read(EMBED), expected, atol=1e-6)


@pytest.mark.parametrize("method", ["ram", "ramplus_tl", "sce", "ties", "della"])
def test_every_method_that_adds_changes_has_the_rows_of_the_base(merge, read, method):
    parameters = "" if method in ("ram", "ramplus_tl", "sce") else "\nparameters: {weight: 1, density: 1}"
    text = f"merge_method: {method}\nbase_model: BASE\nmodels: [{{model: ONE}}, {{model: TWO}}]{parameters}"
    short = merge(text.replace("BASE", "a").replace("ONE", "tall").replace("TWO", "b"), "short")
    assert short.shape(EMBED) == (97, 64)
    assert any("tall has 105 rows and the base 97; those beyond are left out" in note for note in short.notes)
    tall = merge(text.replace("BASE", "tall").replace("ONE", "a").replace("TWO", "b"), "tall")
    assert torch.equal(tall.read(EMBED), read("tall", EMBED))
    assert not torch.equal(tall.read(Q.format(0)), read("tall", Q.format(0)))
    assert tall.config["vocab_size"] == 105
    assert any("a has 97 rows and the base 105; the model is left out here" in note for note in tall.notes)


@pytest.fixture
def broken(folders, tmp_path):
    """A copy of model b with its tensors changed by a function."""

    def made(change, config=None, name="broken") -> Path:
        folder = tmp_path / name
        shutil.copytree(folders["b"], folder)
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        stated = json.loads((folder / "config.json").read_text("utf-8"))
        (folder / "config.json").write_text(json.dumps(stated | (config or {})), "utf-8")
        return folder

    return made


def test_a_tensor_missing_in_a_donor_is_merged_without_it_and_said(merge, read, broken):
    folder = broken(lambda tensors: tensors.pop(NORM))
    weighted = "[{model: a, parameters: {weight: 1}}, {model: %s, parameters: {weight: 1}}]" % folder  # noqa: UP031
    merged = merge(f"merge_method: linear\nmodels: {weighted}")
    assert torch.equal(merged.read(NORM), read("a", NORM))
    assert any(NORM in note and "lacks it" in note for note in merged.notes)
    alone = merge(f"merge_method: ties\nbase_model: {folder}\nmodels: [{{model: a, parameters: {{weight: 1}}}}]", "alone")
    assert NORM not in alone
    assert any(f"lacks are left out, first {NORM}" in note for note in alone.notes)


def test_whole_numbers_are_copied_and_keep_their_dtype(merge, broken):
    """Not merged, and not turned into the dtype of the result."""
    counter = torch.tensor([3, 2**40 + 1])
    folder = broken(lambda tensors: tensors.update({"model.counter": counter}))
    merged = merge(f"""
merge_method: linear
base_model: {folder}
models: [{{model: {folder}, parameters: {{weight: 1}}}}, {{model: a, parameters: {{weight: 1}}}}]
dtype: float16
""")
    assert merged.dtype("model.counter") == torch.int64  # torch.equal alone would take half-precision numbers for them
    assert torch.equal(merged.read("model.counter"), counter)
    assert merged.dtype(NORM) == torch.float16


def test_nan_in_a_donor_is_refused_before_anything_is_written(merge, broken, tmp_path, monkeypatch):
    begun = []
    monkeypatch.setattr(Writer, "__init__", lambda *_, **__: begun.append("a folder"))
    folder = broken(lambda tensors: tensors[NORM].fill_(float("nan")))
    with pytest.raises(WeightsError, match="is not finite: model.norm.weight has 64 values"):
        merge(f"merge_method: ties\nbase_model: a\nmodels: [{{model: {folder}, parameters: {{weight: 1, density: 0.5}}}}]")
    assert not begun
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("method", ["linear", "task_arithmetic", "model_stock", "nuslerp", "arcee_fusion", "slerp", "karcher"])
def test_nan_that_comes_out_in_the_result_is_refused_by_the_name_of_its_model(merge, broken, tmp_path, method, value):
    folder = broken(lambda tensors: tensors[NORM][3:4].fill_(value))
    donors = {"slerp": ["a", folder], "arcee_fusion": [folder]}.get(method, [folder, "b"])
    given = {"models": [{"model": str(one), "parameters": {"weight": 1}} for one in donors], "base_model": "a"}
    given |= {"parameters": {"t": 0.5}} if method == "slerp" else {}
    with pytest.raises(WeightsError, match="broken is not finite: model.norm.weight has 1 value"):
        merge(json.dumps({"merge_method": method} | given))
    assert not list(tmp_path.glob("out*"))


def test_other_shapes_and_kinds_are_refused(merge, broken):
    folder = broken(lambda tensors: tensors.update({Q.format(0): torch.zeros(64, 32)}))
    both = f"[{{model: a, parameters: {{weight: 1}}}}, {{model: {folder}, parameters: {{weight: 1}}}}]"
    with pytest.raises(ModelError, match=r"q_proj.weight: .*broken has the shape \[64, 32\], not \[64, 64\]"):
        merge(f"merge_method: linear\nmodels: {both}")
    with pytest.raises(ModelError, match="must be of one architecture; found llama: a; qwen2: qwen2"):
        merge("merge_method: linear\nmodels: [{model: a, parameters: {weight: 1}}, {model: qwen2, parameters: {weight: 1}}]")


def test_quantized_models_are_refused(merge, broken):
    folder = broken(lambda tensors: None, {"quantization_config": {"quant_method": "gptq"}})
    with pytest.raises(ModelError, match="quantized or stored otherwise than dense"):
        merge(f"merge_method: passthrough\nmodels: [{{model: {folder}}}]")


@pytest.mark.parametrize(
    ("text", "kind", "wanted"),
    [
        ("merge_method: tise\nmodels: [{model: a}]", MethodError, "'tise' is unknown. Did you mean 'ties'?"),
        ("merge_method: linear\nmodels: [{model: a}]", SettingError, "linear needs `weight` for a; no scope gives it here"),
        ("merge_method: linear\nmodels: [{model: a, parameters: {wieght: 1}}]", SettingError, "'wieght'. Did you mean 'weight'?"),
        ("merge_method: ties\nmodels: [{model: a, parameters: {weight: 1}}]", RecipeError, "ties needs `base_model:`"),
        ("merge_method: ties\nbase_model: a\nmodels: [{model: a}]", RecipeError, "ties takes 1 or more models besides the base; found 0"),
        ("merge_method: passthrough\nmodels: [{model: a}, {model: b}]", RecipeError, "passthrough takes 1 model; found 2: a, b"),
        ("merge_method: linear\nmodels: [{model: a}, {model: a}]\nparameters: {weight: 1}", RecipeError, "a is listed more than once"),
        ("merge_method: linear\nmodels: [{model: a, parameters: {weight: 1}}, {model: b, parameters: {weight: -1}}]", SettingError,
         "the weights sum to 0"),
        ("merge_method: ties\nbase_model: c\nmodels: [{model: a, parameters: {weight: 1, density: 1.5}}]", SettingError, "from 0 to 1"),
        ("merge_method: ties\nbase_model: c\nmodels: [{model: a, parameters: {weight: x}}]", SettingError, "a must be a number; got x"),
        ("merge_method: linear\nmodels: [{model: nowhere}]", WeightsError, "'nowhere'"),
        ("merge_method: passthrough\nslices: [{sources: [{model: a, layer_range: [2, 9]}]}]", RecipeError, "a has 4 layers, and"),
        ("merge_method: passthrough\nslices: [{sources: [{model: a, layer_range: [3, 5]}]}]", RecipeError, "a has 4 layers, and"),
        ("merge_method: linear\nslices: [{sources: [{model: a, layer_range: [0, 2]}, {model: b, layer_range: [0, 3]}]}]\n"
         "parameters: {weight: 1}",
         RecipeError, "its sources have 2 and 3 layers"),
        ("merge_method: ties\nbase_model: c\nslices: [{sources: [{model: a, layer_range: [0, 2]}]}]\nparameters: {weight: 1}", RecipeError,
         "needs its base c among the sources of every slice"),
        ("merge_method: passthrough\nmodels: [{model: a+b}]", WeightsError, "b has no adapter_config.json"),
    ],
)  # fmt: skip
def test_what_cannot_be_merged_is_said_before_anything_is_written(merge, tmp_path, monkeypatch, text, kind, wanted):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(kind) as error:
        merge(text)
    assert wanted in str(error.value)
    assert not list(tmp_path.iterdir())


def test_reasons_of_all_documents_are_said_at_once(merge):
    with pytest.raises(ModelwrightError, match="2 problems") as error:
        merge("""
name: one
merge_method: tise
models: [{model: a}]
---
merge_method: linear
models: [{model: a}]
""")
    assert "one: merge_method 'tise'" in str(error.value)
    assert "linear needs `weight`" in str(error.value)


def test_karcher_has_no_weight(merge):
    merged = merge("merge_method: karcher\nmodels: [{model: a, parameters: {weight: 5}}, {model: b}]")
    plain = merge("merge_method: karcher\nmodels: [{model: a}, {model: b}]", save="plain")
    assert same(merged, plain.path)
    assert any("weight is left out, as mergekit does; karcher has no such parameter" in note for note in merged.notes)


def test_an_unlisted_base_is_averaged_where_mergekit_does(merge):
    listed = merge("merge_method: karcher\nmodels: [{model: a}, {model: c}]", save="listed")
    assert same(merge("merge_method: karcher\nbase_model: c\nmodels: [{model: a}]", save="karcher"), listed.path)
    mean = merge("merge_method: linear\nmodels: [{model: a}, {model: c}]\nparameters: {weight: 1}", save="mean")
    text = "merge_method: linear\nbase_model: c\nmodels: [{model: a}]\nparameters: {weight: 1}"
    assert same(merge(text, save="linear"), mean.path)


def test_an_unlisted_base_without_a_weight_is_not_averaged(merge, folders):
    merged = merge("merge_method: linear\nbase_model: c\nmodels: [{model: a, parameters: {weight: 1}}]")
    assert same(merged, folders["a"])
    assert any("base_model c gives config and tokenizer, and no weight" in note for note in merged.notes)


def test_weights_may_stay_as_they_are_on_the_sphere(merge, read):
    text = "merge_method: multislerp\nmodels: [{model: a, parameters: {weight: W}}, {model: b, parameters: {weight: 0.75}}]\n"
    plain = merge(text.replace("W", "0.25"), save="plain")
    text += "parameters: {normalize_weights: false}"
    assert same(merge(text.replace("W", "0.25")), plain.path)
    longer = merge(text.replace("W", "0.25").replace("0.75", "2.25").replace("0.25", "0.75"), save="longer")
    assert torch.allclose(longer.read(EMBED), 3 * plain.read(EMBED), atol=1e-6)


@pytest.mark.parametrize("options", ["", "base_model: c\n", "base_model: c\nparameters: {normalize_weights: false}\n"])
def test_one_model_on_the_sphere_comes_back(merge, folders, options):
    merged = merge(f"merge_method: multislerp\n{options}models: [{{model: a, parameters: {{weight: 0.3}}}}]")
    assert same(merged, folders["a"])


def test_what_has_no_counterpart_is_said(merge):
    two = "models: [{model: a, parameters: {weight: 1}}, {model: b, parameters: {weight: 1}}]\n"
    merged = merge(f"merge_method: multislerp\n{two}parameters: {{eps: 10}}", save="sphere")
    assert "parameters: eps is left out; vectors are divided by their lengths as they are, and those of length 0 stay 0." in merged.notes
    merged = merge(f"merge_method: task_arithmetic\nbase_model: c\n{two}parameters: {{rescale: true}}", save="sum")
    assert "parameters: rescale is left out; nothing is dropped, so there is nothing to make up for." in merged.notes


@pytest.mark.parametrize("method", ["ties", "breadcrumbs", "dare_linear", "della"])
def test_rescale_restores_the_sum_of_sizes(merge, read, method):
    more = ", gamma: 0.1" if method == "breadcrumbs" else ""
    text = f"merge_method: {method}\nbase_model: c\nmodels: [{{model: a, parameters: {{weight: 1, density: 0.3{more}}}}}]\n"
    text += "parameters: {normalize: false, rescale: %s}"
    whole, sizes = (read("a", EMBED) - read("c", EMBED)).abs().sum(), {}
    for rescale in ("true", "false"):
        found = merge(text % rescale, save=rescale, as_mergekit=True).read(EMBED) - read("c", EMBED)
        sizes[rescale] = float(found.abs().sum())
    assert sizes["true"] == pytest.approx(float(whole), rel=1e-5)
    assert sizes["false"] < 0.8 * float(whole)


def test_columns_of_a_matrix_may_have_arcs_of_their_own(merge, read):
    text = "merge_method: nuslerp\nmodels: [{model: a, parameters: {weight: 1}}, {model: b, parameters: {weight: 1}}]\n"
    columns = merge(text + "parameters: {nuslerp_flatten: false, nuslerp_row_wise: true}").read(UP.format(0))
    method = Nuslerp(by_column=True)
    expected = method.tensor(read("a", UP.format(0)), [read(name, UP.format(0)) for name in ("a", "b")]).whole()
    assert torch.equal(columns, expected)
    whole = merge(text, save="whole")
    assert same(merge(text + "parameters: {nuslerp_row_wise: true}", save="flat"), whole.path)  # a flat tensor has no columns


def test_ram_boosts_what_one_model_alone_changed(merge, read):
    text = "merge_method: ramplus_tl\nbase_model: c\nmodels: [{model: a}, {model: b}]\nparameters: {epsilon: 0.1, r: 0.5, alpha: 2}"
    one, two = (read(name, EMBED) - read("c", EMBED) for name in ("a", "b"))
    own = [(one.abs() > 0.1) & (two.abs() <= 0.1), (two.abs() > 0.1) & (one.abs() <= 0.1)]
    shared = (one.abs() > 0.1) & (two.abs() > 0.1)
    boosts = [1 + 0.5 * min(int(shared.sum()) / int(mask.sum()), 2) for mask in own]
    assert 1 < boosts[0] < 2
    expected = boosts[0] * one * own[0] + boosts[1] * two * own[1] + (one + two) / 2 * shared
    assert torch.allclose(merge(text).read(EMBED) - read("c", EMBED), expected, atol=1e-6)
    plain = merge(text.replace("ramplus_tl", "ram"), save="plain")
    assert torch.allclose(plain.read(EMBED) - read("c", EMBED), one * own[0] + two * own[1] + (one + two) / 2 * shared, atol=1e-6)
    assert any("r is left out, as mergekit does; ram has no such parameter" in note for note in plain.notes)


def test_parameters_without_meaning_are_noted(merge):
    merged = merge("""
merge_method: linear
models: [{model: a, parameters: {weight: 1, density: 0.5, normalize: true}}]
parameters: {int8_mask: true, flavour: sweet}
bogus: 1
""")
    said = "\n".join(merged.notes)
    assert "density is left out, as mergekit does; linear has no such parameter" in said
    assert "normalize is left out, as mergekit does; it is one for all models" in said
    assert "flavour is left out" in said
    assert "bogus: left out" in said
    assert "int8_mask" not in said


def test_weights_that_are_all_zero_are_noted_and_leave_the_base(merge, folders):
    merged = merge("merge_method: task_arithmetic\nbase_model: c\nmodels: [{model: a, parameters: {weight: 0}}]")
    assert same(merged, folders["c"])
    assert any("all weights are 0, so it stays the base's" in note for note in merged.notes)


def test_the_output_is_no_input_and_is_not_overwritten_unasked(merge, folders, tmp_path):
    text = "merge_method: passthrough\nmodels: [{model: a}]\n"
    merge(text)
    with pytest.raises(RecipeError, match="exists and is not empty"):
        merge(text)
    merge(text, overwrite=True)
    for save in (folders["a"], folders["a"].parent):
        with pytest.raises(RecipeError, match="which is never touched"):
            mw.merge(text, save=save, overwrite=True)


@pytest.fixture
def adapter(tmp_path):
    """The folder of an adapter of model a, and a's module with it merged in."""
    import peft

    with quiet():
        module = peft.get_peft_model(tiny("llama", seed=1), peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
        module.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter", module.merge_and_unload()


def test_a_model_and_its_adapter_are_inputs_too(merge, folders, adapter):
    text = f"merge_method: passthrough\nmodels: [{{model: a+{adapter[0]}}}]\n"
    merge(text)
    for save in (folders["a"], adapter[0]):
        with pytest.raises(RecipeError, match="which is never touched"):
            mw.merge(text, save=save, overwrite=True)


def test_what_a_killed_merge_left_is_removed_and_what_is_not_ours_stays(merge, tmp_path):
    text, steps = "merge_method: passthrough\nmodels: [{model: a}]", tmp_path / "out.steps"
    steps.mkdir()
    (steps / "mine").touch()
    with pytest.raises(RecipeError, match="holds something else"):
        merge(text)
    assert (steps / "mine").exists()
    (steps / MARKER).touch()
    merge(text)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


# Several documents, adapters, experts


def test_documents_name_each_other(merge, read, tmp_path):
    merged = merge("""
merge_method: task_arithmetic
base_model: c
models: [{model: mean, parameters: {weight: 0.5}}]
---
name: mean
merge_method: linear
models: [{model: a, parameters: {weight: 1}}, {model: b, parameters: {weight: 1}}]
""")
    mean = (read("a", Q.format(1)) + read("b", Q.format(1))) / 2
    assert torch.allclose(merged.read(Q.format(1)), (mean + read("c", Q.format(1))) / 2, atol=1e-6)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("place", ["../precious", "{}/precious"])
def test_a_name_is_no_path(merge, tmp_path, place):
    precious, name = tmp_path / "precious", place.format(tmp_path)
    precious.mkdir()
    (precious / "file").touch()
    merge(f"""
merge_method: passthrough
models: [{{model: {name}}}]
---
name: {name}
merge_method: linear
models: [{{model: a, parameters: {{weight: 1}}}}, {{model: b, parameters: {{weight: 1}}}}]
""")
    assert [path.name for path in precious.iterdir()] == ["file"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "precious"]


def test_an_adapter_from_the_hub_comes_without_pickles(merge, adapter, monkeypatch):
    import huggingface_hub

    asked = {}
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **options: asked.update(options, name=name) or str(adapter[0]))
    merge("merge_method: passthrough\nmodels: [{model: a+one/adapter@main}]")
    assert asked == {"name": "one/adapter", "revision": "main", "allow_patterns": HUB_FILES, "repo_type": "model"}


def test_an_adapter_that_is_nowhere_is_named_with_its_model(merge, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name, wanted in (("one/adapter", "the hub did not give it"), ("./adapter", "there is no such folder")):
        with pytest.raises(WeightsError, match=rf"a\+{name}: an adapter .*was asked for.*{wanted}"):
            merge(f"merge_method: passthrough\nmodels: [{{model: a+{name}}}]")


def test_two_models_may_have_the_same_adapter_and_each_has_it_merged_once(merge, read, adapter):
    folder, whole = adapter
    merged = merge(f"merge_method: linear\nmodels: [{{model: a+{folder}}}, {{model: b+{folder}}}]\nparameters: {{weight: 1}}")
    change = whole.get_parameter(Q.format(0)) - read("a", Q.format(0))
    assert torch.allclose(merged.read(Q.format(0)), (read("a", Q.format(0)) + read("b", Q.format(0))) / 2 + change, atol=1e-6)


def test_the_ids_of_special_tokens_come_with_the_tokenizer(merge, folders, tmp_path):
    folder = shutil.copytree(folders["b"], tmp_path / "other")
    stated = json.loads((folder / "config.json").read_text("utf-8"))
    (folder / "config.json").write_text(json.dumps(stated | {"eos_token_id": 7, "pad_token_id": 8}), "utf-8")
    text = "merge_method: linear\nmodels: [{model: a, parameters: {weight: 1}}, {model: %s, parameters: {weight: 1}}]\n" % folder  # noqa: UP031
    plain, theirs = merge(text, "plain"), merge(text + f"tokenizer_source: {folder}\n", "theirs")
    assert plain.config["eos_token_id"] != 7
    assert (theirs.config["eos_token_id"], theirs.config["pad_token_id"]) == (7, 8)


def test_an_adapter_is_merged_into_its_model_first(merge, folders, adapter):
    folder, whole = adapter
    merged = merge(f"merge_method: passthrough\nmodels: [{{model: a+{folder}}}]")
    for name, value in whole.state_dict().items():
        assert torch.allclose(merged.read(name), value, atol=1e-6), name
    assert not torch.equal(merged.read(Q.format(0)), Checkpoint(folders["a"]).read(Q.format(0)))


def test_the_result_carries_its_configuration_and_its_record(merge):
    merged = merge("merge_method: passthrough\nmodels: [{model: a}]\n")
    assert (merged.path / "mergekit_config.yml").read_text("utf-8").startswith("merge_method: passthrough")
    step = json.loads((merged.path / "modelwright.json").read_text("utf-8"))["steps"][0]
    assert step["method"] == "merge.passthrough"
    assert merged.model.tokenizer is not None


def test_a_result_of_several_documents_carries_all_of_them_and_they_make_it_again(merge):
    text = """
merge_method: slerp
base_model: c
models: [{model: c}, {model: both}]
parameters: {t: 0.3}
---
name: both
merge_method: linear
models: [{model: a, parameters: {weight: 1}}, {model: b, parameters: {weight: 3}}]
"""
    merged = merge(text)
    kept = (merged.path / "mergekit_config.yml").read_text("utf-8")
    assert kept.index("merge_method: slerp") < kept.index("---") < kept.index("name: both")
    assert same(merge(kept, save="again"), merged.path)


def test_the_starter_is_a_model_too(merge, starter, tmp_path):
    merged = merge("merge_method: passthrough\nmodels: [{model: starter}]")
    assert same(merged, starter)
    model = mw.apply("starter", Lora(rank=2))
    for name, value in model.module.named_parameters():
        if "lora_B" in name:
            value.data.fill_(0.1)
    model.save(tmp_path / "adapter")
    whole = model.module.merge_and_unload().state_dict()["model.layers.0.mlp.down_proj.weight"]
    merged = merge(f"merge_method: passthrough\nmodels: [{{model: starter+{tmp_path}/adapter}}]", save="with")
    assert torch.equal(merged.read("model.layers.0.mlp.down_proj.weight"), whole)


def test_nothing_but_the_tensors_slices_is_held(merge, monkeypatch):
    """No module is built and no large tensor is read whole."""
    from modelwright.core import model, stream

    monkeypatch.setattr(stream, "LARGE", 0)
    monkeypatch.setattr(Checkpoint, "read", lambda *_: pytest.fail("a tensor was read whole"))
    monkeypatch.setattr(model, "load_module", lambda *_: pytest.fail("a module was built"))
    merge("merge_method: ties\nbase_model: c\nmodels: [{model: a, parameters: {weight: 1, density: 0.5}}]")


def test_a_folder_may_be_any_model(merge, tmp_path):
    for seed in (1, 2):
        Model(name="gpt2", module=tiny("gpt2", seed=seed)).save(tmp_path / f"gpt2-{seed}")
    merged = merge(f"""
merge_method: passthrough
slices:
  - sources: [{{model: {tmp_path}/gpt2-1, layer_range: [0, 3]}}]
  - sources: [{{model: {tmp_path}/gpt2-2, layer_range: [2, 4]}}]
""")
    assert merged.config["n_layer"] == 5
    assert outputs(merged.model.module).isfinite().all()


def test_a_filter_that_is_part_of_no_name_is_said(merge):
    merged = merge("""
        merge_method: linear
        models:
        - {model: a, parameters: {weight: [{filter: self_atn, value: 0.5}, {value: 1.0}]}}
        - {model: b, parameters: {weight: 1.0}}
    """)
    assert any("'self_atn' is part of no tensor's name. Did you mean 'self_attn'?" in note for note in merged.notes)


def test_a_base_of_other_widths_gives_no_config(merge, folders, tmp_path):
    tiny("llama", hidden_size=32).save_pretrained(tmp_path / "narrow")
    with pytest.raises(ModelError, match="hidden_size 32; a has 64"):
        merge(f"merge_method: passthrough\nbase_model: {tmp_path / 'narrow'}\nslices: [{{sources: [{{model: a, layer_range: [1, 3]}}]}}]")


@pytest.mark.parametrize(("stated", "said"), [("half", "half"), (".inf", "inf"), ("-.inf", "-inf"), (".nan", "nan")])
@pytest.mark.parametrize("method", ["linear", "ties"])
def test_a_weight_that_is_no_number_is_said_with_its_model(merge, method, stated, said):
    with pytest.raises(SettingError, match=f"weight of b must be a number; got {said}"):
        merge(f"merge_method: {method}\nbase_model: c\nmodels: [{{model: a, parameters: {{weight: 1}}}}, "
              f"{{model: b, parameters: {{weight: {stated}}}}}]")  # fmt: skip


def test_default_is_the_one_part_of_a_model_of_text(merge):
    models = "models: [{model: a, parameters: {weight: 1}}, {model: b, parameters: {weight: 2}}]"
    whole, part = (
        merge(f"merge_method: linear\n{models}", "whole"),
        merge(f"merge_method: linear\nmodules: {{default: {{{models}}}}}", "part"),
    )
    assert whole.names == part.names
    assert all(torch.equal(whole.read(name), part.read(name)) for name in whole)


def test_sums_of_16_bits_are_not_rounded_before_they_are_stored_in_32(merge, broken):
    random = torch.Generator().manual_seed(0)

    def in_halves(tensors):
        for name, value in tensors.items():
            tensors[name] = (value + 0.1 * torch.randn(value.shape, generator=random)).bfloat16()

    folders = [broken(in_halves, name=name) for name in ("one", "other")]
    models = [{"model": str(folder), "parameters": {"weight": weight}} for folder, weight in zip(folders, (0.3, 0.7), strict=True)]
    merged = merge(json.dumps({"merge_method": "linear", "models": models, "dtype": "bfloat16", "out_dtype": "float32"})).read(NORM)
    one, other = (load_file(folder / "model.safetensors")[NORM].float() for folder in folders)
    assert torch.allclose(merged, 0.3 * one + 0.7 * other, rtol=1e-6)
    assert not torch.equal(merged, merged.bfloat16().float())

"""Steps that follow each other: what works goes on to work when it is saved and opened, and what cannot be is refused by a sentence."""

import pytest
import torch
from tiny import outputs, tiny, tiny_inputs

import modelwright as mw
from modelwright.core.errors import LayoutError, ModelwrightError, SettingError, SiteError
from modelwright.maths.allocation import keep_highest
from modelwright.maths.masks import lowest


def after(kind, *steps, **config):
    """A small model after these steps."""
    model = mw.open(tiny(kind, **config))
    for name, settings in steps:
        model = mw.apply(model, mw.find(name)(**settings), data=[tiny_inputs(model.module)])
    return model


@pytest.mark.parametrize("second", [("factor.svd", {}), ("quantize.rtn", {"group": 32}), ("prune.magnitude", {"store": "sparse"})])
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_blocks_that_share_what_is_stored_otherwise_are_opened(kind, second, tmp_path):
    model = after(kind, ("share.depth", {"loops": 2}), second)
    model.save(tmp_path / "out")
    assert torch.allclose(outputs(mw.open(tmp_path / "out").module), outputs(model.module), atol=1e-5)


@pytest.mark.parametrize("first", [("share.graphhash", {"keep": 0.5}), ("factor.tensor", {"where": "embed"})])
@pytest.mark.parametrize("second", [("prune.slicegpt", {}), ("prune.llm_pruner", {"units": ("residual",)})])
def test_channels_stay_in_tables_that_are_stored_otherwise(first, second):
    with pytest.raises(SiteError, match="channels leave whole tables.*remove first"):
        after("llama", first, second)


@pytest.mark.parametrize("second", ["prune.shortgpt", "prune.blockpruner", "prune.adapt_pruner", "prune.das", "prune.ftp"])
def test_blocks_stay_where_the_stream_is_turned_between_them(second):
    model = after("llama", ("prune.slicegpt", {"rotation": "each"}))
    before = outputs(model.module)
    method = mw.find(second)
    with pytest.raises(SiteError, match="turns the channels between them: remove them first"):
        mw.apply(model, method(**method.small), data=[tiny_inputs(model.module)])
    assert torch.equal(outputs(model.module), before)


def test_experts_that_share_are_refused_a_second_time():
    model = after("mixtral", ("share.roast", {"keep": 0.5}))
    with pytest.raises(LayoutError, match="chooses no weight"):
        mw.apply(model, mw.find("share.roast")(keep=0.5))


@pytest.mark.parametrize(("share", "gone"), [pytest.param(0.3, 0.3, marks=pytest.mark.slow), (0.9, 0.9)])
def test_adapt_pruner_reaches_its_share_by_default(share, gone):
    model = mw.open(tiny("llama"))
    sizes = [sum(value.numel() for value in model.module.model.layers.parameters())]
    mw.apply(model, mw.find("prune.adapt_pruner")(share=share), data=[tiny_inputs(model.module)])
    sizes.append(sum(value.numel() for value in model.module.model.layers.parameters()))
    assert 1 - sizes[1] / sizes[0] == pytest.approx(gone, abs=0.03)


@pytest.mark.parametrize(("name", "settings"), [("prune.llm_pruner", {"units": ("heads",), "share": 0.2}), ("prune.reap", {"share": 0.1})])
def test_a_share_of_less_than_one_unit_is_said(name, settings):
    spared = {} if name == "prune.reap" else {"spare_first": 0, "spare_last": 0}
    model = after("qwen3_moe" if name == "prune.reap" else "llama", (name, {**settings, **spared}))
    assert any("is less than one. Raise share" in note for note in model.history[-1]["notes"])


def test_shares_are_of_whole_numbers_as_they_are_written():
    assert int(lowest(torch.rand(100, 1000), 0.29).sum()) == 29_000
    assert lowest(torch.rand(3, 100), 0.57, per="row").sum(1).tolist() == [57] * 3
    assert len(keep_highest(torch.rand(100), 0.29)) == 71
    assert int(lowest(torch.rand(1, 10), 0.999).sum()) == 9


@pytest.mark.parametrize(
    ("step", "marks"),
    [
        (("factor.svd", {}), {"float", "low-rank"}),
        (("factor.svd", {"store": "dense"}), {"float"}),
        (("factor.svd", {"keep": 1.0}), {"float", "sparse"}),
        (("factor.tensor", {"keep": 1.0, "where": "embed"}), {"float", "sparse"}),
        (("factor.tensor", {"store": "dense", "where": "embed"}), {"float"}),
    ],
)
def test_marks_say_what_was_done(step, marks):
    assert after("llama", ("prune.magnitude", {}), step).marks == marks
    assert after("llama", ("prune.magnitude", {"sparsity": 0.0})).marks == {"float"}


def test_kinds_of_units_are_named_once_and_ranks_have_a_multiple():
    with pytest.raises(SettingError, match="names a kind twice"):
        mw.find("prune.flap")(units=("mlp", "mlp"))
    with pytest.raises(ModelwrightError, match="has no rank that is a multiple of 1000. Lower multiple"):
        after("llama", ("factor.svd", {"multiple": 1000}))
    ranks = {layer.rank for layer in after("llama", ("factor.svd", {"multiple": 8})).module.modules() if hasattr(layer, "rank")}
    assert ranks
    assert all(rank % 8 == 0 for rank in ranks)

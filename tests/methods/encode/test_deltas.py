"""What both codecs of changes promise, as steps and as folders."""

import json

import pytest
import torch
from tiny import tiny

import modelwright as mw
from modelwright.core.errors import ModelError, RecipeError, SettingError, WeightsError
from modelwright.core.kinds import held
from modelwright.core.model import Model
from modelwright.core.weights import Checkpoint
from modelwright.methods.encode.compeft import Compeft
from modelwright.methods.encode.fedzip import Fedzip

CODES = ("rice", "huffman", "masks")
CODECS = [Compeft(keep=0.1), Compeft(keep=0.2, scope="tensor", scale=2.0), Fedzip(), Fedzip(keep=0.5, levels=5)]


def tuned(seed=1, size=0.02, dtype=torch.bfloat16):
    """The small model and a change of it."""
    module = tiny().to(dtype)
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in module.parameters():
            value.add_((torch.randn(value.shape, generator=random) ** 3 * size).to(dtype))
    return module


@pytest.fixture
def folders(tmp_path):
    for name, module in (("base", tiny().bfloat16()), ("tuned", tuned())):
        Model(name=name, module=module).save(tmp_path / name)
    (tmp_path / "tuned" / "tokenizer.json").write_text("{}")
    return tmp_path


def changes(before, after):
    return {name: after.state_dict()[name].float() - value.float() for name, value in before.state_dict().items()}


def stored(folder):
    found = Checkpoint(folder)
    return sum(found.nbytes(name) for name in found.names)


@pytest.mark.parametrize("codec", CODECS, ids=str)
@pytest.mark.parametrize("code", CODES)
def test_the_folder_gives_the_model_that_the_step_gives(codec, code, folders):
    codec = type(codec)(**codec.settings() | {"code": code})
    mw.pack_delta(folders / "tuned", folders / "base", save=folders / "change", codec=codec)
    unpacked = mw.unpack_delta(folders / "change", folders / "base", save=folders / "out")
    expected = mw.apply(str(folders / "tuned"), codec, base=str(folders / "base"))
    found = held(unpacked.module)
    assert all(torch.equal(value, found[name]) for name, value in held(expected.module).items())
    assert (folders / "out" / "tokenizer.json").read_text() == "{}"
    assert unpacked.config.hidden_size == mw.open(folders / "base").config.hidden_size


def test_the_note_says_the_bytes_that_are_stored(folders):
    mw.pack_delta(folders / "tuned", folders / "base", save=folders / "change", codec=Compeft(keep=0.1))
    (note,) = mw.apply(str(folders / "tuned"), Compeft(keep=0.1), base=str(folders / "base")).history[-1]["notes"]
    assert f"it takes {stored(folders / 'change'):,} bytes" in note
    assert "times fewer than the tensors themselves" in note


def test_a_change_takes_few_of_the_bytes_of_its_model(folders):
    sizes = {}
    for codec in (Compeft(keep=0.05), Fedzip(keep=0.05), Fedzip(keep=0.05, code="rice")):
        mw.pack_delta(folders / "tuned", folders / "base", save=folders / "change", codec=codec, overwrite=True)
        sizes[codec] = stored(folders / "tuned") / stored(folders / "change")
    compeft, huffman, rice = sizes.values()
    assert compeft > 20  # 47 times in large models; here each of 38 tensors has its values
    assert 8 < huffman < 16
    assert rice > huffman


@pytest.mark.parametrize("codec", [Compeft(), Fedzip()], ids=str)
def test_no_change_leaves_the_base(codec, folders):
    mw.pack_delta(folders / "base", folders / "base", save=folders / "change", codec=codec)
    out = mw.unpack_delta(folders / "change", folders / "base", save=folders / "out")
    assert all(torch.equal(value, out.module.state_dict()[name]) for name, value in tiny().bfloat16().state_dict().items())


@pytest.mark.parametrize("codec", [Compeft(keep=0.1, skip=["head", "norm"]), Fedzip(where="mlp")], ids=str)
def test_what_is_left_out_is_the_models_own(codec, folders):
    mw.pack_delta(folders / "tuned", folders / "base", save=folders / "change", codec=codec)
    out = mw.unpack_delta(folders / "change", folders / "base", save=folders / "out").module
    after = tuned()
    assert torch.equal(out.lm_head.weight, after.lm_head.weight)
    assert torch.equal(out.model.norm.weight, after.model.norm.weight)
    assert not torch.equal(out.model.layers[0].mlp.up_proj.weight, after.model.layers[0].mlp.up_proj.weight)


def test_whole_tensors_are_stored_only_where_they_differ(folders):
    mw.pack_delta(folders / "base", folders / "base", save=folders / "change", codec=Fedzip(where="mlp"))
    assert {name.rpartition(".")[2] for name in Checkpoint(folders / "change").names} == {"codes", "bits", "lengths", "values"}


def test_a_default_codec_is_compeft(folders):
    mw.pack_delta(folders / "tuned", folders / "base", save=folders / "change")
    assert json.loads((folders / "change" / "delta.json").read_text())["codec"] == {"encode.compeft": {}}


def test_another_base_or_folder_is_refused_and_nothing_is_left(folders):
    Model(name="other", module=tiny(seed=3).bfloat16()).save(folders / "other")
    mw.pack_delta(folders / "tuned", folders / "base", save=folders / "change")
    before = sorted(path.name for path in folders.iterdir())
    with pytest.raises(WeightsError, match="was packed against .*base, and .*other has other weights"):
        mw.unpack_delta(folders / "change", folders / "other", save=folders / "out")
    with pytest.raises(WeightsError, match=r"has no delta\.json"):
        mw.unpack_delta(folders / "base", folders / "base", save=folders / "out")
    with pytest.raises(ModelError, match="is in memory"):
        mw.pack_delta(tuned(), folders / "base", save=folders / "out")
    with pytest.raises(RecipeError, match="which is never touched"):
        mw.pack_delta(folders / "tuned", folders / "base", save=folders / "base", overwrite=True)
    with pytest.raises(RecipeError, match="which is never touched"):
        mw.unpack_delta(folders / "change", folders / "base", save=folders / "base", overwrite=True)
    Model(name="wide", module=tiny(hidden_size=96).bfloat16()).save(folders / "wide")
    with pytest.raises(ModelError):
        mw.pack_delta(folders / "wide", folders / "base", save=folders / "out")
    assert sorted(path.name for path in folders.iterdir()) == sorted([*before, "wide"])


def test_an_even_number_of_levels_is_refused():
    with pytest.raises(SettingError, match="levels is 4; an odd number"):
        Fedzip(levels=4)

"""A model is named with its adapter: "model+adapter"."""

import gc
import shutil
from pathlib import Path

import pytest
import torch
from tiny import outputs, tiny

import modelwright as mw
from modelwright.core import recipe
from modelwright.core.contract import letters
from modelwright.core.errors import ModelError
from modelwright.core.model import Model, open
from modelwright.methods.adapt.lora import Lora
from modelwright.methods.merge.linear import Linear
from modelwright.methods.quantize.rtn import Rtn


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    """A base, two adapters of it with random B, and each folded by peft."""
    folder = tmp_path_factory.mktemp("adapters")
    Model(name="llama", module=tiny(), tokenizer=letters()).save(folder / "base")
    for seed in (1, 2):
        model = mw.apply(open(folder / "base"), Lora(rank=2), seed=seed)
        generator = torch.Generator().manual_seed(seed)
        for name, value in model.module.named_parameters():
            if "lora_B" in name:
                value.data.copy_(0.1 * torch.randn(value.shape, generator=generator))
        model.save(folder / f"adapter{seed}")
        model.module = model.module.merge_and_unload()
        model.save(folder / f"folded{seed}")
    return folder


def test_the_adapter_is_in_the_weights(folders):
    model = open(f"{folders}/base+{folders}/adapter1")
    assert torch.allclose(outputs(model.module), outputs(open(folders / "folded1").module), atol=1e-6)
    assert model.marks == {"float"}
    assert model.tokenizer("a b")["input_ids"] == letters()("a b")["input_ids"]


def test_two_adapters_go_in_one_after_the_other(folders):
    model = open(f"{folders}/base+{folders}/adapter1+{folders}/adapter2")
    parts = [open(folders / name).module.state_dict() for name in ("folded1", "folded2", "base")]
    for name, value in model.module.state_dict().items():
        assert torch.allclose(value, parts[0][name] + parts[1][name] - parts[2][name], atol=1e-6), name


def test_opening_reads_nothing_and_the_temporary_folder_goes_with_the_model(folders):
    model = open(f"{folders}/base+{folders}/adapter1")
    assert model._made is None
    made = model.folder
    assert (made / "model.safetensors").is_file()
    del model
    gc.collect()
    assert not made.exists()


def test_donors_of_a_merge_on_disk_may_be_named_so(folders, tmp_path):
    names = [f"{folders}/base+{folders}/adapter{number}" for number in (1, 2)]
    merged = mw.apply(folders / "base", Linear(), donors=names, save=tmp_path / "merged")
    expected = mw.apply(folders / "base", Linear(), donors=[folders / "folded1", folders / "folded2"], save=tmp_path / "expected")
    assert torch.allclose(outputs(merged.module), outputs(expected.module), atol=1e-6)


def test_a_recipe_may_start_from_it_and_knows_its_files(folders, tmp_path, monkeypatch):
    monkeypatch.chdir(folders)
    made = recipe.read({"model": "base+adapter1", "steps": [{"quantize.rtn": {"group": 32}}], "save": str(tmp_path / "out")})
    assert recipe.whole_names(made).model == f"{folders}/base+{folders}/adapter1"
    digests = {recipe.model_digest(open(name)) for name in ("base+adapter1", "base+adapter2", "base", f"{folders}/base+adapter1")}
    assert len(digests) == 3
    run = recipe.run(made)
    plain = mw.apply(open(folders / "folded1"), Rtn(group=32))
    assert torch.allclose(outputs(run.model.module), outputs(plain.module), atol=1e-4)


def test_a_pickled_adapter_is_never_loaded(folders, tmp_path):
    shutil.copytree(folders / "adapter1", tmp_path / "pickled")
    (tmp_path / "pickled" / "adapter_model.safetensors").rename(tmp_path / "pickled" / "adapter_model.bin")
    with pytest.raises(ModelError, match="pickles are never loaded"):
        open(f"{folders}/base+{tmp_path}/pickled")
    with pytest.raises(ModelError, match="pickles are never loaded"):
        open(tmp_path / "pickled").module  # noqa: B018


def test_what_is_no_adapter_of_the_model_is_refused(folders, tmp_path):
    with pytest.raises(ModelError, match="no folder with a peft adapter"):
        open(f"{folders}/base+{folders}/folded1")
    Model(name="other", module=tiny(intermediate_size=96)).save(tmp_path / "other")
    with pytest.raises(ModelError, match="is no adapter of"):
        open(f"{tmp_path}/other+{folders}/adapter1").module  # noqa: B018
    mw.apply(folders / "base", Rtn(group=32), save=tmp_path / "packed")
    with pytest.raises(ModelError, match="only a dense model"):
        open(f"{tmp_path}/packed+{folders}/adapter1").module  # noqa: B018

"""Tensors that are read from disk in parts."""

import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import tiny
from transformers import ResNetConfig, ResNetForImageClassification

import modelwright as mw
from modelwright.core import stream
from modelwright.core.errors import ModelError, WeightsError
from modelwright.core.weights import Checkpoint, Writer
from modelwright.methods.merge.linear import Linear
from modelwright.methods.merge.ties import Ties


def test_slices_and_places_of_a_tensor_on_disk_equal_those_of_the_tensor(tmp_path):
    whole = torch.randn(7, 5, 4).bfloat16()
    with Writer(tmp_path / "one") as out:
        out.add("w", whole)
    found = Checkpoint(tmp_path / "one").on_disk("w")
    assert found.shape == whole.shape
    assert found.dtype == whole.dtype
    flat = whole.reshape(-1)
    for at in (slice(0, 140), slice(3, 99), slice(None), slice(130, 999)):
        assert torch.equal(found[at], flat[at])


@pytest.mark.parametrize("method", [Linear(weights=(1.0, 3.0)), Ties(keep=0.3), Ties(keep=1.0, scale=0.5)], ids=repr)
def test_merging_in_parts_equals_merging_whole_tensors(method, tmp_path, monkeypatch):
    folders = []
    for seed in range(3):
        folders.append(tmp_path / str(seed))
        tiny("llama", seed).save_pretrained(folders[-1])
    whole, parts = (tmp_path / name for name in ("whole", "parts"))
    mw.apply(folders[0], method, donors=folders[1:], save=whole)
    monkeypatch.setattr(stream, "LARGE", 0)
    mw.apply(folders[0], method, donors=folders[1:], save=parts)
    left, right = Checkpoint(whole), Checkpoint(parts)
    assert all(torch.equal(left.read(name), right.read(name)) for name in left)
    assert not all(torch.equal(left.read(name), Checkpoint(folders[0]).read(name)) for name in left)


def test_running_statistics_are_merged_in_memory_as_on_disk(tmp_path):
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    for number in (0, 1):
        module = ResNetForImageClassification(config)
        for name, value in module.named_buffers():
            if "running" in name:
                value.fill_(1.0 + 2 * number)
        module.save_pretrained(tmp_path / str(number))
    folders = [str(tmp_path / str(number)) for number in (0, 1)]
    streamed = mw.apply(folders[0], Linear(), donors=folders, save=tmp_path / "out").module.state_dict()
    inside = mw.apply(mw.open(folders[0]), Linear(), donors=folders).module.state_dict()
    assert all(torch.equal(streamed[name], value) for name, value in inside.items())
    assert all((value == 2).all() for name, value in inside.items() if "running" in name)


def renamed(source, folder, rename):
    """A copy of a folder whose tensors are under other names."""
    shutil.copytree(source, folder)
    tensors = rename(load_file(source / "model.safetensors"))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_donors_whose_files_use_other_names_are_merged_in_memory(tmp_path):
    for number in (0, 1):
        tiny("gpt2", seed=number).save_pretrained(tmp_path / str(number))
    hub = renamed(tmp_path / "0", tmp_path / "hub", lambda found: {name.removeprefix("transformer."): one for name, one in found.items()})
    plain, other = (
        mw.apply(start, Linear(), donors=[start, tmp_path / "1"], save=tmp_path / f"out {start.name}") for start in (tmp_path / "0", hub)
    )
    assert "did not stream it" in other.history[-1]["notes"][0]
    assert not plain.history[-1]["notes"]
    assert all(torch.equal(value, other.module.state_dict()[name]) for name, value in plain.module.state_dict().items())


def test_a_tied_head_that_one_of_the_files_holds_is_no_difference(tmp_path):
    tiny("gpt2").save_pretrained(tmp_path / "0")
    twice = renamed(tmp_path / "0", tmp_path / "1", lambda found: found | {"lm_head.weight": found["transformer.wte.weight"].clone()})
    mw.apply(tmp_path / "0", Linear(), donors=[tmp_path / "0", twice], save=tmp_path / "out")
    assert (tmp_path / "out").is_dir()


def test_tensors_of_eight_bits_are_refused(tmp_path):
    tiny().save_pretrained(tmp_path / "0")
    narrow = renamed(tmp_path / "0", tmp_path / "1", lambda found: {name: one.to(torch.float8_e4m3fn) for name, one in found.items()})
    with pytest.raises(ModelError, match="tensors have 8 bits"):
        mw.apply(tmp_path / "0", Linear(), donors=[narrow], save=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(ModelError, match="tensors have 8 bits"):
        mw.apply(tiny(), Linear(), donors=[tiny().to(torch.float8_e4m3fn)])


def test_tensors_read_ahead_are_those_of_the_files_in_any_order(tmp_path):
    values = {name: torch.full((3,), float(number)) for number, name in enumerate("abcde")}
    save_file(values, tmp_path / "model.safetensors")
    with stream.Ahead(Checkpoint(tmp_path), ["a", "b", "d"]) as ahead:
        for name in "abdabeedcba":
            assert torch.equal(ahead.read(name), values[name])
        held = ahead.read("a")
        held.zero_()
        assert torch.equal(ahead.read("a"), values["a"])


def test_an_error_of_reading_ahead_is_told_at_its_own_tensor(tmp_path):
    save_file({name: torch.zeros(64) for name in "abc"}, tmp_path / "model.safetensors")
    checkpoint = Checkpoint(tmp_path)
    os.truncate(tmp_path / "model.safetensors", checkpoint.place("c").start)
    with stream.Ahead(checkpoint, ["a", "b", "c"]) as ahead:
        assert len(ahead.read("a")) == len(ahead.read("b")) == 64
        with pytest.raises(WeightsError, match="became shorter"):
            ahead.read("c")

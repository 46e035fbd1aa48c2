import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import tiny

import modelwright as mw
from modelwright.core.errors import ModelError, RecipeError, WeightsError
from modelwright.core.model import Model
from modelwright.core.weights import Checkpoint, Writer
from modelwright.maths.coded_floats import SPLITS


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 0.02


@pytest.fixture
def mixed(tmp_path):
    """A folder with tensors of many kinds, whose header says something, and other files."""
    odd = torch.tensor([0.0, -0.0, float("nan"), float("inf"), 1e-45] * 1000)
    tensors = {
        "b.weight": random(300, 700).bfloat16(), "a.weight": random(129, 65).half(), "norm": torch.ones(4096).bfloat16(),
        "c.weight": random(201, 333), "odd": odd, "odd16": odd.bfloat16(), "scalar": torch.tensor(3.5), "one": torch.ones(1).half(),
        "empty": torch.empty(0, 5), "ids": torch.arange(999), "wide": random(7, 9).double(), "mask": torch.tensor([True, False, True]),
        "short": random(3).bfloat16(),
    }  # fmt: skip
    folder = tmp_path / "in"
    (folder / "inside").mkdir(parents=True)
    (folder / ".cache").mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt", "note": "kept"})
    (folder / "config.json").write_text('{"model_type":  "llama"}')
    (folder / "tokenizer.json").write_bytes(b"\x00\x01")
    (folder / "inside" / "more.txt").write_text("more")
    (folder / ".cache" / "lock").write_text("a tool's own")
    return folder


def same(one, two):
    whole = SPLITS[one.dtype].whole if one.dtype in SPLITS else one.dtype
    return one.dtype == two.dtype and one.shape == two.shape and torch.equal(one.view(whole), two.view(whole))


def test_everything_comes_back_bit_by_bit(mixed, tmp_path):
    mw.compress(mixed, tmp_path / "small")
    mw.decompress(tmp_path / "small", tmp_path / "out")
    before, after = Checkpoint(mixed), Checkpoint(tmp_path / "out")
    assert before.metadata == after.metadata
    assert set(before.names) == set(after.names)
    assert all(same(before.read(name), after.read(name)) for name in before.names)
    for file in ("config.json", "tokenizer.json", "inside/more.txt"):
        assert (mixed / file).read_bytes() == (tmp_path / "out" / file).read_bytes() == (tmp_path / "small" / file).read_bytes()
    assert not (tmp_path / "small" / ".cache").exists()
    assert not (tmp_path / "out" / "compressed.json").exists()


def test_floats_are_coded_where_that_is_smaller_and_the_rest_stays(mixed, tmp_path):
    mw.compress(str(mixed), tmp_path / "small")
    record = json.loads((tmp_path / "small" / "compressed.json").read_text())
    assert set(record["tensors"]) == {"a.weight", "b.weight", "c.weight", "norm", "odd", "odd16"}
    assert record["tensors"]["a.weight"] == {"dtype": "F16", "shape": [129, 65]}
    small = load_file(tmp_path / "small" / "model.safetensors")  # plain tools read the file
    assert {name for name in small if name.startswith("b.weight")} == {f"b.weight_{part}" for part in ("codes", "bits", "lengths", "signs")}
    assert {"ids", "wide", "mask", "scalar"} <= set(small)
    nbytes = sum(value.nbytes for name, value in small.items() if name.startswith("b.weight"))
    assert nbytes < 0.68 * Checkpoint(mixed).nbytes("b.weight")


def test_shards_and_ties_come_back(tmp_path):
    tensors = {f"layer.{number}": random(64, 100, seed=number).bfloat16() for number in range(6)}
    with Writer(tmp_path / "in", shard_bytes=30_000) as out:
        for name, value in tensors.items():
            out.add(name, value)
        out.tie("head", "layer.0")
    mw.compress(tmp_path / "in", tmp_path / "small")
    mw.decompress(tmp_path / "small", tmp_path / "out")
    found = Checkpoint(tmp_path / "out")
    assert all(same(found.read(name), value) for name, value in tensors.items())
    assert found.ties == Checkpoint(tmp_path / "in").ties == {"head": "layer.0"}


def test_one_file_is_taken_too(mixed, tmp_path):
    mw.compress(mixed / "model.safetensors", tmp_path / "small")
    assert sorted(file.name for file in (tmp_path / "small").iterdir()) == ["compressed.json", "model.safetensors"]
    mw.decompress(tmp_path / "small", tmp_path / "out")
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "note": "kept"}


def test_a_tensor_whose_parts_would_take_anothers_name_stays(tmp_path):
    save_file({"x": random(4096).bfloat16(), "x_codes": torch.arange(9)}, tmp_path / "odd.safetensors")
    mw.compress(tmp_path / "odd.safetensors", tmp_path / "small")
    mw.decompress(tmp_path / "small", tmp_path / "out")
    assert {name: value.sum().item() for name, value in load_file(tmp_path / "out" / "model.safetensors").items()} == {
        name: value.sum().item() for name, value in load_file(tmp_path / "odd.safetensors").items()
    }


def test_a_model_computes_the_same_after_both(tmp_path):
    Model(name="llama", module=tiny().bfloat16()).save(tmp_path / "in")
    mw.compress(tmp_path / "in", tmp_path / "small")
    with pytest.raises(ModelError, match=r"is compressed\. Write the model that it was with `modelwright.decompress`"):
        mw.open(tmp_path / "small")
    mw.decompress(tmp_path / "small", tmp_path / "out")
    before, after = (mw.open(tmp_path / name).module.state_dict() for name in ("in", "out"))
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_what_cannot_be_done_is_said_and_leaves_nothing(mixed, tmp_path):
    with pytest.raises(WeightsError, match=r"has no compressed\.json"):
        mw.decompress(mixed, tmp_path / "out")
    with pytest.raises(RecipeError, match="which is never touched"):
        mw.compress(mixed, mixed, overwrite=True)
    mw.compress(mixed, tmp_path / "small")
    with pytest.raises(WeightsError, match="is compressed already"):
        mw.compress(tmp_path / "small", tmp_path / "smaller")
    with pytest.raises(WeightsError, match="not empty"):
        mw.compress(mixed, tmp_path / "small")
    parts = load_file(tmp_path / "small" / "model.safetensors")
    for name, broken in (("codes", torch.zeros_like(parts["b.weight_codes"])), ("bits", parts["b.weight_bits"] * 0 + 7)):
        save_file(parts | {f"b.weight_{name}": broken}, tmp_path / "small" / "model.safetensors")
        with pytest.raises(WeightsError, match=r"'b\.weight': .* damaged"):
            mw.decompress(tmp_path / "small", tmp_path / "out")
    del parts["b.weight_lengths"]
    save_file(parts, tmp_path / "small" / "model.safetensors")
    with pytest.raises(WeightsError, match="lacks parts of the coded tensor 'b.weight'"):
        mw.decompress(tmp_path / "small", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "small"]

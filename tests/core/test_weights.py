# ruff: noqa: PT012
import builtins
import errno
import gc
import json
import math
import os
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from modelwright.core import weights
from modelwright.core.errors import WeightsError
from modelwright.core.files import claim
from modelwright.core.weights import Checkpoint, Writer, check_finite
from modelwright.maths.slices import Sliced


def same_bits(a, b):
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and torch.equal(a.contiguous().reshape(-1).view(torch.uint8), b.contiguous().reshape(-1).view(torch.uint8))
    )


@pytest.fixture
def tensors():
    made = torch.Generator().manual_seed(0)
    tensors = {}
    for code, dtype in weights.DTYPES.items():
        size = torch.tensor([], dtype=dtype).element_size()
        data = torch.randint(0, 2 if dtype == torch.bool else 120, (3 * 5 * size,), generator=made, dtype=torch.uint8)
        tensors[f"{code}.odd"] = data.view(dtype).view(3, 5)
    tensors["scalar"] = torch.tensor(2.5, dtype=torch.bfloat16)
    tensors["empty"] = torch.empty(0, 7)
    tensors["wide"] = torch.randn(64, 32, generator=made)
    return tensors


@pytest.fixture
def folder(tmp_path, tensors):
    path = tmp_path / "model"
    path.mkdir()
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    (path / "config.json").write_text('{"model_type": "llama"}')
    return path


def craft(path, header, data=b"", length=None):
    """A safetensors file by hand."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path.parent


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


# reading


def test_reads_what_the_safetensors_library_wrote(folder, tensors):
    checkpoint = Checkpoint(folder)
    assert set(checkpoint) == set(tensors)
    for name, tensor in tensors.items():
        assert same_bits(checkpoint.read(name), tensor), name
        assert checkpoint.shape(name) == tuple(tensor.shape)
        assert checkpoint.dtype(name) == tensor.dtype
        assert checkpoint.nbytes(name) == tensor.nbytes
    assert checkpoint.metadata == {"format": "pt"}
    assert checkpoint.config == {"model_type": "llama"}
    assert same_bits(checkpoint.read_rows("wide", 3, 9), tensors["wide"][3:9])
    assert checkpoint.read_rows("empty", 0, 0).shape == (0, 7)


def test_names_come_in_file_order(folder):
    checkpoint = Checkpoint(folder)
    starts = [checkpoint.place(name).start for name in checkpoint.names]
    assert starts == sorted(starts)


def test_reading_reads_no_more_than_asked(folder, tensors, monkeypatch):
    count = 0
    places = os.preadv

    class Counted:
        def __init__(self, file):
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def fileno(self):
            return self.file.fileno()

        def read(self, size):
            nonlocal count
            count += size
            return self.file.read(size)

    def counted_open(path, mode, buffering):
        assert buffering == 0
        return Counted(builtins.open(path, mode, buffering=0))

    def counted_preadv(descriptor, views, start):
        nonlocal count
        count += sum(map(len, views))
        return places(descriptor, views, start)

    monkeypatch.setattr(weights, "open", counted_open, raising=False)
    monkeypatch.setattr(os, "preadv", counted_preadv)
    checkpoint = Checkpoint(folder)
    header = (folder / "model.safetensors").stat().st_size - sum(t.nbytes for t in tensors.values())
    assert count == header
    count = 0
    checkpoint.read("wide")
    assert count == tensors["wide"].nbytes
    count = 0
    checkpoint.read_rows("wide", 1, 3)
    assert count == 2 * 32 * 4
    count, stored = 0, checkpoint.on_disk("wide")
    first = stored[2:10]
    assert stored[2:10] is first  # a formula that needs it twice
    assert count == 8 * 4
    assert stored[2:9].tolist() == first[:7].tolist()


def test_opens_a_file_and_a_folder_with_one_other_file(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "adapter_model.safetensors")
    assert Checkpoint(tmp_path).names == ["a"]
    assert Checkpoint(tmp_path / "adapter_model.safetensors").names == ["a"]


def test_rows_out_of_range_are_refused(folder):
    with pytest.raises(WeightsError, match=r"Rows 60 to 65 .* \[64, 32\]"):
        Checkpoint(folder).read_rows("wide", 60, 65)
    with pytest.raises(WeightsError, match="Rows 0 to 1"):
        Checkpoint(folder).read_rows("scalar", 0, 1)


def test_an_unknown_tensor_gets_the_nearest_name(folder):
    with pytest.raises(WeightsError, match="Did you mean 'wide'"):
        Checkpoint(folder).read("wid")


def test_a_hub_snapshot_may_link_to_its_blobs(tmp_path):
    hub = tmp_path / "models--a--b"
    (hub / "blobs").mkdir(parents=True)
    snapshot = hub / "snapshots" / "c0ffee"
    snapshot.mkdir(parents=True)
    save_file({"a": torch.ones(2)}, hub / "blobs" / "123")
    (snapshot / "model.safetensors").symlink_to("../../blobs/123")
    assert Checkpoint(snapshot).names == ["a"]


def test_a_hub_name_is_fetched_without_pickles(tmp_path, monkeypatch):
    import huggingface_hub

    save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors")
    asked = {}

    def snapshot(name, **options):
        asked.update(options, name=name)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert Checkpoint("someone/something-1b").names == ["a"]
    assert asked["name"] == "someone/something-1b"
    assert not any("bin" in pattern or "pt" in pattern for pattern in asked["allow_patterns"])


def test_a_hub_name_that_cannot_be_fetched_is_a_clear_error(monkeypatch):
    import huggingface_hub

    def snapshot(*_, **__):
        raise huggingface_hub.errors.LocalEntryNotFoundError("no connection")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    with pytest.raises(WeightsError, match="no such folder here, and the hub did not give it"):
        Checkpoint("someone/something")


# faults


@pytest.mark.parametrize("source", ["./nowhere", "/no/where/at/all", "nowhere.safetensors", "some/where/else", "~nobody/model", "some/"])
def test_a_missing_folder_is_not_looked_for_on_the_hub(source, monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("the hub was asked"))
    with pytest.raises(WeightsError, match="there is no such folder"):
        Checkpoint(source)


@pytest.mark.parametrize(
    ("source", "wanted"),
    [
        ("./modles/mine", "there is no such folder. Did you mean 'models/mine'?"),
        ("models/mien", "the hub did not give it (OSError: no connection). Did you mean 'models/mine'? Check the name"),
        ("models/mine/last/", "there is no such folder."),
        ("modles", "the hub did not give it (OSError: no connection). Did you mean 'models'?"),
        ("gpt2", "the hub did not give it (OSError: no connection). Check the name"),
        ("models/mine.safetensor", "Did you mean 'models/mine.safetensors'?"),
    ],
)
def test_a_folder_of_nearly_the_name_is_suggested(source, wanted, tmp_path, monkeypatch):
    import huggingface_hub

    def snapshot(*_, **__):
        raise OSError("no connection")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "mine").mkdir(parents=True)
    (tmp_path / "models" / "mine.safetensors").touch()
    with pytest.raises(WeightsError) as error:
        Checkpoint(source)
    assert wanted in str(error.value)


def test_a_folder_of_pickles_is_never_loaded(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n")
    with pytest.raises(WeightsError, match=r"never loaded.*save_pretrained"):
        Checkpoint(tmp_path)


def test_an_empty_folder(tmp_path):
    with pytest.raises(WeightsError, match=r"holds no \.safetensors file"):
        Checkpoint(tmp_path)


def test_many_files_without_an_index(tmp_path):
    for name in "ab":
        save_file({name: torch.ones(2)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(WeightsError, match=r"no model\.safetensors\.index\.json"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("header", "data", "said"),
    [
        (b"{", b"", "corrupt header"),
        (b"[1]", b"", "no JSON object"),
        (b"\xff\xfe{}", b"", "corrupt header"),
        ({"a": entry(offsets=(0, 8))}, bytes(4), "truncated"),
        ({"a": entry(offsets=(0, 8))}, bytes(12), "4 bytes after its last tensor"),
        ({"a": entry(), "b": entry(offsets=(4, 12))}, bytes(12), "'b' overlaps"),
        ({"a": entry(), "b": entry(offsets=(16, 24))}, bytes(24), "'b' leaves 8 bytes unused"),
        ({"a": entry(dtype="F4")}, bytes(8), "'F4', which is unknown"),
        ({"a": entry(shape=(3,))}, bytes(8), "cannot fill bytes 0 to 8"),
        ({"a": entry(shape=(-2,))}, bytes(8), "entry of 'a'"),
        ({"a": entry(shape=(True,))}, bytes(8), "entry of 'a'"),
        ({"a": entry(offsets=(8, 0))}, bytes(8), "entry of 'a'"),
        ({"a": [1, 2]}, bytes(8), "entry of 'a'"),
        ({"a": {"dtype": "F32"}}, bytes(8), "entry of 'a'"),
        (b'{"a": 1, "a": 2}', b"", "twice"),
        ({"__metadata__": {"format": 3}}, b"", "metadata are not all text"),
        ({"__metadata__": ["format"]}, b"", "corrupt header"),
    ],
)
def test_a_corrupt_header_is_refused_at_opening(tmp_path, header, data, said):
    with pytest.raises(WeightsError, match=said):
        Checkpoint(craft(tmp_path / "model.safetensors", header, data))


@pytest.mark.parametrize("length", [10**18, 2**63, 200_000_000, 50])
def test_an_absurd_header_length(tmp_path, length):
    with pytest.raises(WeightsError, match="no whole safetensors file"):
        Checkpoint(craft(tmp_path / "model.safetensors", {}, length=length))


def test_a_file_of_a_few_bytes(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"abc")
    with pytest.raises(WeightsError, match="no whole safetensors file"):
        Checkpoint(tmp_path)


@pytest.fixture
def sharded(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "one.safetensors")
    save_file({"b": torch.zeros(3)}, tmp_path / "two.safetensors")

    def index(**weight_map):
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        return tmp_path

    return index


def test_reads_a_sharded_checkpoint(sharded):
    checkpoint = Checkpoint(sharded(a="one.safetensors", b="two.safetensors"))
    assert checkpoint.names == ["a", "b"]
    assert same_bits(checkpoint.read("b"), torch.zeros(3))


def test_a_missing_shard(sharded):
    with pytest.raises(WeightsError, match=r"lacks the weight file 'three\.safetensors'"):
        Checkpoint(sharded(a="one.safetensors", b="two.safetensors", c="three.safetensors"))


def test_a_tensor_that_its_shard_lacks(sharded):
    with pytest.raises(WeightsError, match=r"two\.safetensors lacks 1 tensors .* 'c'"):
        Checkpoint(sharded(a="one.safetensors", b="two.safetensors", c="two.safetensors"))


def test_a_tensor_that_the_index_lacks(sharded, tmp_path):
    folder = sharded(a="one.safetensors")
    save_file({"a": torch.ones(2), "b": torch.ones(1)}, tmp_path / "one.safetensors")
    with pytest.raises(WeightsError, match="holds 1 tensors that the index does not place there, such as 'b'"):
        Checkpoint(folder)


@pytest.mark.parametrize("place", ["../out.safetensors", "/tmp/out.safetensors", "sub/../../out.safetensors"])
def test_an_index_that_points_outside(sharded, place):
    with pytest.raises(WeightsError, match="outside the folder"):
        Checkpoint(sharded(a=place))


def test_a_link_that_points_outside(sharded, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "x.safetensors"
    save_file({"c": torch.ones(2)}, out)
    folder = sharded(c="link.safetensors")
    (folder / "link.safetensors").symlink_to(out)
    with pytest.raises(WeightsError, match="outside the folder"):
        Checkpoint(folder)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": {"a": 3}}', '{"weight_map": 1}'])
def test_a_corrupt_index(tmp_path, text):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(WeightsError, match=r"index\.json"):
        Checkpoint(tmp_path)


def test_all_faults_are_said_at_once(sharded):
    with pytest.raises(WeightsError, match=r"(?s)2 problems.*'x'.*'y'"):
        Checkpoint(sharded(a="x", b="y"))


def test_a_corrupt_config(folder):
    (folder / "config.json").write_text("{,")
    with pytest.raises(WeightsError, match=r"config\.json is no JSON"):
        _ = Checkpoint(folder).config


def test_a_file_truncated_after_opening(folder):
    checkpoint = Checkpoint(folder)
    os.truncate(folder / "model.safetensors", 2000)
    with pytest.raises(WeightsError, match="became shorter"):
        [checkpoint.read(name) for name in checkpoint]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.complex64, torch.float8_e5m2])
def test_values_that_are_not_finite_are_named_and_counted(tmp_path, monkeypatch, dtype):
    monkeypatch.setattr(weights, "CHECKED", 40)
    monkeypatch.setattr(weights, "PIECE", 64)
    bad = torch.ones(100).to(torch.float32)
    bad[[3, 70]] = torch.tensor([float("nan"), float("inf")])
    save_file(
        {"good": torch.ones(100), "bad": bad.to(dtype), "whole": torch.ones(3, dtype=torch.int64)},
        tmp_path / "model.safetensors",
    )
    seen = []
    with pytest.raises(WeightsError, match="bad has 2 values of 100 that are NaN or infinite"):
        check_finite(Checkpoint(tmp_path), progress=lambda done, total: seen.append((done, total)))
    assert seen[-1][0] == seen[-1][1]


@pytest.mark.parametrize("place", [0, 39, 40, 55, 79, 80, 99])
def test_no_value_is_passed_over(tmp_path, monkeypatch, place):
    monkeypatch.setattr(weights, "CHECKED", 40)
    monkeypatch.setattr(weights, "PIECE", 64)
    values = torch.zeros(100)
    values[place] = -float("inf")
    save_file({"a": values}, tmp_path / "model.safetensors")
    with pytest.raises(WeightsError, match="a has 1 values of 100"):
        check_finite(Checkpoint(tmp_path))


@pytest.mark.parametrize("count", [16, 15, 1])  # those that no multiple of 8 bytes hold are written last
def test_a_sum_too_large_for_its_dtype_is_refused(tmp_path, count):
    large = Sliced((count,), torch.float16, lambda at: torch.full((at.stop - at.start,), 1e6))
    with pytest.raises(WeightsError, match="'a' would hold NaN or infinity.*too large for torch.float16"), Writer(tmp_path / "out") as out:
        out.add("a", large)
    assert not list(tmp_path.iterdir())


def test_finite_weights_pass(tmp_path):
    save_file({"a": torch.randn(9, 9), "b": torch.ones(7).to(torch.float8_e4m3fn)}, tmp_path / "model.safetensors")
    check_finite(Checkpoint(tmp_path))


# writing


def write(folder, tensors, **options):
    with Writer(folder, **options) as out:
        for name, tensor in tensors.items():
            out.add(name, tensor)


@pytest.mark.parametrize("room", [1 << 20, 1 << 16])
def test_the_safetensors_library_reads_what_was_written(tmp_path, tensors, room, monkeypatch):
    monkeypatch.setattr(weights._Shard, "ROOM", room)
    write(tmp_path / "new", tensors)
    assert sorted(os.listdir(tmp_path / "new")) == ["model.safetensors"]
    loaded = load_file(tmp_path / "new" / "model.safetensors")
    assert set(loaded) == set(tensors)
    assert all(same_bits(loaded[name], tensors[name]) for name in tensors)
    with safe_open(tmp_path / "new" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    checkpoint = Checkpoint(tmp_path / "new")
    assert all(same_bits(checkpoint.read(name), tensors[name]) for name in tensors)


def test_every_tensor_is_aligned(tmp_path, tensors):
    write(tmp_path / "new", tensors)
    checkpoint = Checkpoint(tmp_path / "new")
    assert all(checkpoint.place(n).start % checkpoint.dtype(n).itemsize == 0 for n in checkpoint if n != "empty")


def test_a_large_header_room_is_not_stored_with_a_small_model(tmp_path):
    write(tmp_path / "new", {"a": torch.ones(4)})
    assert (tmp_path / "new" / "model.safetensors").stat().st_size < 200


def test_a_header_left_in_its_room_is_padded(tmp_path, monkeypatch):
    monkeypatch.setattr(weights._Shard, "ROOM", 1 << 10)
    write(tmp_path / "new", {"a": torch.ones(1000, 100)})
    assert (tmp_path / "new" / "model.safetensors").stat().st_size == 1024 + 400_000
    assert same_bits(load_file(tmp_path / "new" / "model.safetensors")["a"], torch.ones(1000, 100))


def test_shards_stay_below_their_size_and_the_index_names_them(tmp_path):
    tensors = {f"t{n}": torch.full((10, 10), float(n)) for n in range(7)}
    write(tmp_path / "new", tensors, shard_bytes=900)
    files = sorted(os.listdir(tmp_path / "new"))
    assert files == [f"model-{n:05d}-of-00004.safetensors" for n in (1, 2, 3, 4)] + ["model.safetensors.index.json"]
    index = json.loads((tmp_path / "new" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 7 * 400
    checkpoint = Checkpoint(tmp_path / "new")
    assert all(same_bits(checkpoint.read(name), tensors[name]) for name in tensors)
    for name, file in index["weight_map"].items():
        with safe_open(tmp_path / "new" / file, "pt") as shard:
            assert same_bits(shard.get_tensor(name), tensors[name])


def test_a_full_header_room_starts_a_new_shard(tmp_path, monkeypatch):
    monkeypatch.setattr(weights._Shard, "ROOM", 2048)
    monkeypatch.setattr(weights._Shard, "MOST_LATE", 64)
    write(tmp_path / "new", {f"t{n}": torch.ones(3 if n % 3 else 4) for n in range(100)})
    assert len(Checkpoint(tmp_path / "new")) == 100
    assert len(os.listdir(tmp_path / "new")) > 3


def test_copy_keeps_the_bytes(tmp_path, folder, tensors):
    checkpoint = Checkpoint(folder)
    with Writer(tmp_path / "new") as out:
        for name in checkpoint:
            out.copy(name, checkpoint)
        out.copy("again", checkpoint, source="wide")
        out.copy_file(folder / "config.json")
        out.write_json("extra.json", {"a": "é"})
    loaded = load_file(tmp_path / "new" / "model.safetensors")
    assert all(same_bits(loaded[name], tensors[name]) for name in tensors)
    assert same_bits(loaded["again"], tensors["wide"])
    assert Checkpoint(tmp_path / "new").config == {"model_type": "llama"}
    assert json.loads((tmp_path / "new" / "extra.json").read_text(encoding="utf-8")) == {"a": "é"}


@pytest.mark.parametrize("how", [errno.EXDEV, None])
def test_copy_without_the_kernels_help(tmp_path, folder, tensors, monkeypatch, how):
    def refused(*_):
        raise OSError(how, "no")

    if how:
        monkeypatch.setattr(os, "copy_file_range", refused, raising=False)
    else:
        monkeypatch.delattr(os, "copy_file_range", raising=False)
    checkpoint = Checkpoint(folder)
    with Writer(tmp_path / "new") as out:
        for name in checkpoint:
            out.copy(name, checkpoint)
    loaded = load_file(tmp_path / "new" / "model.safetensors")
    assert all(same_bits(loaded[name], tensors[name]) for name in tensors)


def test_strided_views_are_written_as_they_look(tmp_path):
    base = torch.arange(12.0).view(3, 4)
    write(tmp_path / "new", {"t": base.T, "s": base[:, 1], "n": torch.nn.Parameter(base)})
    checkpoint = Checkpoint(tmp_path / "new")
    assert same_bits(checkpoint.read("t"), base.T)
    assert same_bits(checkpoint.read("s"), base[:, 1])


def test_a_small_odd_tensor_may_change_after_it_was_added(tmp_path):
    odd = torch.ones(3)
    with Writer(tmp_path / "new") as out:
        out.add("odd", odd)
        odd.zero_()
    assert same_bits(Checkpoint(tmp_path / "new").read("odd"), torch.ones(3))


@pytest.mark.parametrize("shard_bytes", [1 << 30, 400])
def test_ties_are_kept(tmp_path, shard_bytes):
    with Writer(tmp_path / "new", shard_bytes=shard_bytes) as out:
        out.add("embed", torch.ones(10, 10))
        out.tie("head", "embed")
        out.add("other", torch.ones(10, 10))
    checkpoint = Checkpoint(tmp_path / "new")
    assert checkpoint.ties == {"head": "embed"}
    assert set(checkpoint) == {"embed", "other"}


def test_transformers_loads_what_was_written(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=19,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            tie_word_embeddings=True,
        )
    )
    model.save_pretrained(tmp_path / "old")
    old = Checkpoint(tmp_path / "old")
    with Writer(tmp_path / "new", shard_bytes=2000) as out:
        for name in old:
            out.add(name, old.read(name))
        out.tie("lm_head.weight", "model.embed_tokens.weight")
        out.copy_file(tmp_path / "old" / "config.json")
    loaded, info = LlamaForCausalLM.from_pretrained(tmp_path / "new", output_loading_info=True)
    assert not any(info.values()), info
    assert all(same_bits(a, b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True))


def test_an_unknown_dtype_is_refused(tmp_path):
    with pytest.raises(WeightsError, match="complex128, which safetensors cannot store"):
        write(tmp_path / "new", {"a": torch.ones(2, dtype=torch.complex128)})


def test_a_taken_folder_is_refused_and_left_alone(folder):
    before = (folder / "model.safetensors").read_bytes()
    with pytest.raises(WeightsError, match=r"not empty.*overwrite=True"):
        Writer(folder)
    assert (folder / "model.safetensors").read_bytes() == before
    assert not folder.with_name("model.partial").exists()


def test_a_file_in_the_folders_place_is_refused(tmp_path):
    (tmp_path / "new").write_text("")
    with pytest.raises(WeightsError, match="it is a file"):
        Writer(tmp_path / "new", overwrite=True)


def test_overwrite_replaces_the_whole_folder(folder):
    write(folder, {"a": torch.ones(4)}, overwrite=True)
    assert os.listdir(folder) == ["model.safetensors"]
    assert os.listdir(folder.parent) == ["model"]


def test_an_overwrite_that_fails_leaves_the_old_folder(folder):
    before = (folder / "model.safetensors").read_bytes()
    with pytest.raises(KeyError), Writer(folder, overwrite=True) as out:
        out.add("a", torch.ones(4))
        raise KeyError
    assert (folder / "model.safetensors").read_bytes() == before
    assert os.listdir(folder.parent) == ["model"]


def test_an_empty_folder_is_filled(tmp_path):
    (tmp_path / "new").mkdir()
    write(tmp_path / "new", {"a": torch.ones(4)})
    assert Checkpoint(tmp_path / "new").names == ["a"]


def test_an_exception_leaves_nothing(tmp_path):
    with pytest.raises(KeyError), Writer(tmp_path / "new") as out:
        out.add("a", torch.ones(4))
        raise KeyError
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("when", ["write", "fsync", "rename"])
@pytest.mark.parametrize("keep", [False, True])
def test_a_full_disk_leaves_no_folder(tmp_path, monkeypatch, when, keep):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    if when == "fsync":
        monkeypatch.setattr(os, "fsync", full)
    if when == "rename":
        monkeypatch.setattr(weights, "publish", full)
    with pytest.raises(WeightsError, match="disk filled up"), Writer(tmp_path / "new", keep_partial=keep) as out:
        out.add("a", torch.ones(4))
        if when == "write":
            monkeypatch.setattr(os, "pwrite", full)
        out.add("b", torch.ones(4))
    assert os.listdir(tmp_path) == (["new.partial"] if keep else [])


def test_leftovers_of_a_killed_run_are_replaced(tmp_path):
    claim(tmp_path / "new.partial")
    (tmp_path / "new.partial" / "shard-00000.safetensors").write_bytes(b"junk")
    write(tmp_path / "new", {"a": torch.ones(4)})
    assert os.listdir(tmp_path) == ["new"]
    assert os.listdir(tmp_path / "new") == ["model.safetensors"]


@pytest.mark.parametrize("finished", [False, True])
def test_a_kept_partial_folder_is_resumed(tmp_path, monkeypatch, finished):
    tensors = {f"t{n}": torch.full((10, 10), float(n)) for n in range(5)}
    publish = weights.publish

    def killed(*_):
        raise KeyError

    monkeypatch.setattr(weights, "publish", killed)
    with pytest.raises(KeyError), Writer(tmp_path / "new", shard_bytes=900, keep_partial=True) as out:
        for name in list(tensors)[: 5 if finished else 3]:
            out.add(name, tensors[name])
        if not finished:
            raise KeyError
    monkeypatch.setattr(weights, "publish", publish)
    with Writer(tmp_path / "new", shard_bytes=900, keep_partial=True) as out:
        assert out.names == (set(tensors) if finished else {"t0", "t1"})
        for name in tensors.keys() - out.names:
            out.add(name, tensors[name])
    checkpoint = Checkpoint(tmp_path / "new")
    assert all(same_bits(checkpoint.read(name), tensors[name]) for name in tensors)
    assert os.listdir(tmp_path) == ["new"]


def test_what_is_written_goes_to_the_disk_beside_other_work(tmp_path, monkeypatch):
    """And an error there is told, though the last flush does not know of it."""
    synced, flush = [], os.fsync
    monkeypatch.setattr(weights, "BEHIND", 1 << 10)
    monkeypatch.setattr(os, "fsync", lambda file: (synced.append(threading.current_thread()), flush(file)))
    with weights.Writer(tmp_path / "model") as out:
        for number in range(4):
            out.add(f"t{number}", torch.full((256,), float(number)))
    assert any(thread is not threading.main_thread() for thread in synced)
    assert [Checkpoint(tmp_path / "model").read(f"t{number}")[0].item() for number in range(4)] == [0, 1, 2, 3]

    def broken(file):
        if threading.current_thread() is not threading.main_thread():
            raise OSError(errno.EIO, "the disk is broken")
        flush(file)

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(OSError, match="the disk is broken"), weights.Writer(tmp_path / "other") as out:
        for number in range(3):
            out.add(f"t{number}", torch.ones(256))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_small_tensors_that_wait_for_the_end_are_written_after_much_went_to_the_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "BEHIND", 8)
    write(tmp_path / "new", {"large": torch.ones(64), "small": torch.ones(3, dtype=torch.uint8)})
    assert Checkpoint(tmp_path / "new").read("small").tolist() == [1, 1, 1]


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="open files are counted as Linux shows them")
def test_all_tensors_of_a_file_share_one_open_file(folder, tensors):
    def opened():
        return len(os.listdir("/proc/self/fd"))

    before = opened()
    held = [Checkpoint(folder).on_disk(name) for name in tensors for _ in range(50)]
    assert opened() == before + 1
    with ThreadPoolExecutor(4) as pool:
        read = list(pool.map(lambda one: one[0 : math.prod(one.shape)].view(one.shape), held))
    assert all(torch.equal(read[50 * number], value) for number, value in enumerate(tensors.values()))
    del held
    gc.collect()
    assert opened() == before


def test_a_file_that_was_written_anew_is_another(tmp_path):
    found = []
    for value in (1.0, 2.0):
        with Writer(tmp_path / "model", overwrite=True) as out:
            out.add("x", torch.full((8,), value))
        found.append(Checkpoint(tmp_path / "model").on_disk("x"))
    assert [one[0:8].unique().tolist() for one in found] == [[1.0], [2.0]]

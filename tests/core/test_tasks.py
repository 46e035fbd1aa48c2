"""Many models packed into a base, a change and masks: what comes back is the formula, and what lies on disk is small."""

import json

import numpy
import pytest
import torch
from safetensors.torch import load_file
from tiny import outputs, tiny

import modelwright as mw
from modelwright.core.contract import letters
from modelwright.core.errors import ModelError, RecipeError, SettingError, WeightsError
from modelwright.core.model import Model
from modelwright.core.weights import Checkpoint, Writer
from modelwright.maths import slices
from modelwright.maths.bits import packed, unpacked
from modelwright.methods.merge.consensus import Consensus

NAMES = ("code", "prose", "sums")


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def folders(request, tmp_path, monkeypatch):
    """A base and three models that were tuned from it, each mostly in entries of its own."""
    monkeypatch.setattr(slices, "SLICE", 1000)
    for seed, name in enumerate(("base", *NAMES)):
        module = tiny(seed=0, tie_word_embeddings=True)
        with torch.no_grad():
            for value in module.parameters() if seed else ():
                random = torch.Generator().manual_seed(seed)
                value.add_(0.1 * torch.randn(value.shape, generator=random) * (torch.rand(value.shape, generator=random) < 0.4))
        Model(name=name, module=module.to(request.param), tokenizer=letters()).save(tmp_path / name)
    return {name: tmp_path / name for name in ("base", *NAMES)}


def pack(folders, tmp_path, **settings):
    donors = [folders[name] for name in NAMES]
    return mw.pack_tasks(folders["base"], donors, save=tmp_path / "packed", method=Consensus(**settings))


def test_each_task_comes_back_bit_for_bit_as_the_formula_says(folders, tmp_path):
    least = [0.2, 0.4, 0.6]
    place = pack(folders, tmp_path, least_each=least)
    base, ends = Checkpoint(folders["base"]), [Checkpoint(folders[name]) for name in NAMES]
    for number, task in enumerate(NAMES):
        model = mw.unpack_task(place, task, save=tmp_path / f"out-{number}")
        found = Checkpoint(tmp_path / f"out-{number}")
        assert found.names == base.names
        moved = 0
        for name in base.names:
            start = base.read(name)
            changes = [end.read(name).float() - start.float() for end in ends]
            total = changes[0] + changes[1] + changes[2]
            mask = changes[number].abs() > least[number] * (total - changes[number]).abs()
            expected = (start.float() + total.to(start.dtype).float() * mask).to(start.dtype)
            assert torch.equal(found.read(name), expected), name
            moved += int((expected != start).sum())
        assert moved
        assert torch.equal(model.module.lm_head.weight, model.module.model.embed_tokens.weight)
        assert outputs(model.module.float()).isfinite().all()
        assert (tmp_path / f"out-{number}" / "tokenizer.json").is_file()


def test_a_task_is_nearer_to_its_model_than_the_base_or_the_sum_is(folders, tmp_path):
    place = pack(folders, tmp_path)
    base = Checkpoint(folders["base"])
    for number, task in enumerate(NAMES):
        mw.unpack_task(place, number, save=tmp_path / f"out-{number}")
        served, own = Checkpoint(tmp_path / f"out-{number}"), Checkpoint(folders[task])
        change = Checkpoint(place / "change")

        def far(read, own=own):
            return sum(float((read(name).double() - own.read(name).double()).square().sum()) for name in base.names)

        assert far(served.read) < 0.8 * far(base.read)
        assert far(served.read) < 0.8 * far(lambda name, change=change: base.read(name).double() + change.read(name).double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_donors_that_changed_other_entries_come_back_up_to_the_rounding_of_the_change(tmp_path, dtype):
    start, ends = tiny(seed=0).to(dtype), [tiny(seed=0).to(dtype), tiny(seed=0).to(dtype)]
    with torch.no_grad():
        for number, end in enumerate(ends):
            for value in end.parameters():
                value.view(-1)[number::2] += 0.3 * torch.randn(value.numel(), generator=torch.Generator().manual_seed(number))[number::2]
    for name, module in (("base", start), ("one", ends[0]), ("two", ends[1])):
        Model(name=name, module=module).save(tmp_path / name)
    mw.pack_tasks(tmp_path / "base", [tmp_path / "one", tmp_path / "two"], save=tmp_path / "packed")
    unit = torch.finfo(dtype).eps / 2
    for name, end in (("one", ends[0]), ("two", ends[1])):
        found = Checkpoint(mw.unpack_task(tmp_path / "packed", name, save=tmp_path / f"{name}-again").folder)
        for parameter, own in end.named_parameters():
            value, base = found.read(parameter), start.get_parameter(parameter)
            change = (own.float() - base.float()).to(dtype).float()
            assert torch.equal(value, (base.float() + change).to(dtype)), parameter
            far = (value.double() - own.double()).abs()
            assert (far <= 1.01 * unit * (2 * change.double().abs() + own.double().abs())).all(), parameter


def test_of_entries_that_tie_at_the_cut_the_masks_are_of_the_change_that_is_stored(tmp_path, monkeypatch):
    monkeypatch.setattr(slices, "SLICE", 1000)
    for seed, name in enumerate(("base", "one", "two")):
        module = tiny(seed=0).bfloat16()
        with torch.no_grad():
            for number, value in enumerate(module.parameters()):
                random = torch.Generator().manual_seed(100 * seed + number)
                value.copy_(torch.randint(-3, 4, value.shape, generator=random) * bool(seed))  # few sizes, so that many tie
        Model(name=name, module=module).save(tmp_path / name)
    place = mw.pack_tasks(tmp_path / "base", [tmp_path / "one", tmp_path / "two"], save=tmp_path / "packed", method=Consensus(keep=0.5))
    for name in Checkpoint(tmp_path / "base").names:
        ends = [Checkpoint(tmp_path / one).read(name).float() for one in ("one", "two")]
        total = torch.zeros_like(ends[0]).view(-1)
        for end in ends:
            kept = end.view(-1).abs().argsort(stable=True)[end.numel() - end.numel() // 2 :]
            total[kept] += end.view(-1)[kept]
        assert torch.equal(Checkpoint(place / "change").read(name).view(-1).float(), total), name
        for number, end in enumerate(ends):
            bits = unpacked(Checkpoint(place / f"mask-{number}").read(name), end.numel())
            assert torch.equal(bits, end.view(-1).abs() > 0.4 * (total - end.view(-1)).abs()), name


def test_plain_tools_read_the_folder(folders, tmp_path):
    from transformers import AutoModelForCausalLM

    place = pack(folders, tmp_path)
    assert sorted(path.name for path in place.iterdir()) == ["base", "change", "mask-0", "mask-1", "mask-2", "tasks.json"]
    loaded = AutoModelForCausalLM.from_pretrained(place / "base")
    change, mask = (load_file(place / part / "model.safetensors") for part in ("change", "mask-1"))
    again = Checkpoint(mw.unpack_task(place, "prose", save=tmp_path / "out").folder)
    for name, value in change.items():
        kept = numpy.unpackbits(mask[name].numpy(), bitorder="little")[: value.numel()].reshape(value.shape)
        start = loaded.state_dict()[name]
        expected = (start.float() + value.float() * torch.from_numpy(kept)).to(start.dtype)
        assert torch.equal(again.read(name), expected), name
    assert json.loads((place / "tasks.json").read_text("utf-8"))["tasks"] == list(NAMES)


def test_bytes_are_two_models_and_a_bit_for_each_entry_and_task(folders, tmp_path):
    place = pack(folders, tmp_path)
    base = Checkpoint(folders["base"])
    entries, whole = sum(base.read(name).numel() for name in base.names), sum(base.nbytes(name) for name in base.names)
    stored = sum(Checkpoint(path).nbytes(name) for path in place.iterdir() if path.is_dir() for name in Checkpoint(path).names)
    assert stored == 2 * whole + len(NAMES) * entries / 8  # every tensor has a multiple of 8 entries


def test_where_and_skip_leave_tensors_to_the_base(folders, tmp_path):
    place = pack(folders, tmp_path, skip=["embed", "norm"])
    assert "model.embed_tokens.weight" not in Checkpoint(place / "change")
    found = Checkpoint(mw.unpack_task(place, 0, save=tmp_path / "out").folder)
    name = "model.embed_tokens.weight"
    assert torch.equal(found.read(name), Checkpoint(folders["base"]).read(name))


def test_what_cannot_be_packed_or_found_is_said_before_anything_is_written(folders, tmp_path):
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(SettingError, match="two donors or more; got 1"):
        mw.pack_tasks(folders["base"], [folders["code"]], save=tmp_path / "packed")
    with pytest.raises(ModelError, match="is in memory"):
        mw.pack_tasks(folders["base"], [folders["code"], tiny()], save=tmp_path / "packed")
    with pytest.raises(SettingError, match="2 least_each for 3 donors"):
        pack(folders, tmp_path, least_each=[0.1, 0.2])
    with pytest.raises(RecipeError, match="which is never touched"):
        mw.pack_tasks(folders["base"], [folders["code"], folders["prose"]], save=folders["base"], overwrite=True)
    with pytest.raises(WeightsError, match=r"has no tasks\.json"):
        mw.unpack_task(folders["base"], 0, save=tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    place = pack(folders, tmp_path)
    with pytest.raises(SettingError, match="'proze' is no task. Did you mean 'prose'"):
        mw.unpack_task(place, "proze", save=tmp_path / "out")
    with pytest.raises(SettingError, match="3 is no task. The tasks are code, prose, sums, from 0 to 2"):
        mw.unpack_task(place, 3, save=tmp_path / "out")
    with pytest.raises(RecipeError, match="exists and is not empty"):
        pack(folders, tmp_path)


@pytest.mark.parametrize("inside", [".", "base", "base/new", "mask-1", "new", ".."])
def test_a_task_is_never_written_at_below_or_above_what_is_read(folders, tmp_path, inside):
    place = pack(folders, tmp_path)
    before = {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}
    with pytest.raises(RecipeError, match="which is never touched"):
        mw.unpack_task(place, 0, save=place / inside, overwrite=True)
    assert {path: path.read_bytes() for path in place.rglob("*") if path.is_file()} == before
    with pytest.raises(RecipeError, match="lies inside the input"):
        mw.pack_tasks(folders["base"], [folders["code"], folders["prose"]], save=folders["code"] / "new")


def test_what_is_wrong_with_values_or_numbers_is_said_before_a_folder_is_begun(folders, tmp_path, monkeypatch):
    model = mw.open(folders["prose"])
    model.module.model.norm.weight.data[0] = torch.nan
    model.save(tmp_path / "broken")
    begun, first, second = [], folders["base"], folders["code"]
    monkeypatch.setattr(Writer, "__init__", lambda *_, **__: begun.append("a folder"))
    for base, donors in ((first, [second, tmp_path / "broken"]), (tmp_path / "broken", [first, second])):
        with pytest.raises(WeightsError, match=r"is not finite: model\.norm\.weight has 1 values"):
            mw.pack_tasks(base, donors, save=tmp_path / "packed")
    for setting in ("least_each", "keep_each", "weights"):
        with pytest.raises(SettingError, match=f"1 {setting} for 2 donors"):
            mw.pack_tasks(first, [second, folders["prose"]], save=tmp_path / "packed", method=Consensus(**{setting: [0.1]}))
    assert not begun
    assert not list(tmp_path.glob("packed*"))


def test_what_is_left_to_the_base_is_told_and_kept(folders, tmp_path, capsys):
    place = pack(folders, tmp_path, least={"mlp": 0.3})
    (note,) = json.loads((place / "tasks.json").read_text("utf-8"))["notes"]
    assert "merge.consensus left" in note
    assert "weights alone, whose roles its maps do not name; first model.embed_tokens" in note
    assert f"note: {note}" in capsys.readouterr().err.replace("\n", " ").replace("  ", " ").strip()
    mw.pack_tasks(folders["base"], [folders["code"], folders["prose"]], save=tmp_path / "whole")
    assert json.loads((tmp_path / "whole" / "tasks.json").read_text("utf-8"))["notes"] == []


@pytest.mark.parametrize("shape", [(0,), (1,), (8,), (13,), (3, 17)])
def test_bits_come_back(shape):
    mask = torch.randn(shape, generator=torch.Generator().manual_seed(0)) > 0
    found = packed(mask)
    assert found.shape == (*shape[:-1], -(-shape[-1] // 8))
    assert torch.equal(unpacked(found, shape[-1]), mask)
    assert torch.equal(found, torch.from_numpy(numpy.packbits(mask.numpy(), axis=-1, bitorder="little")))

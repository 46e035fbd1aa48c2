"""From disk to disk, never the whole model: a tensor in memory and the next one, which is read meanwhile, or a block and its inputs."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import shutil
import tempfile
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from modelwright.anatomy import Site, anatomy_of, removal
from modelwright.blocks._stored import Stored
from modelwright.blocks.experts import split_experts

from . import kinds, loading, walk
from .errors import ModelwrightError, WeightsError
from .given import Given
from .method import BlockMethod, Chooses, LayerMethod, Method, TensorMethod
from .model import RECORD, Model, check_readable, empty_module, open, put, refuse_not_finite, tensor_of, tokenizer_files, write_card
from .passage import Resident, fill
from .progress import track
from .weights import Checkpoint, Writer, not_finite

if TYPE_CHECKING:
    from transformers import PreTrainedModel

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # glibc's numbers for mallopt
LARGE = 1 << 20  # bytes from which a tensor is read in parts, by methods that can


def possible(model: Model, method: Method, notes: list[str] | None = None, donors: Sequence[Model] = ()) -> bool:
    """Whether the method can stream this model: it lies on disk, and its files name what the module names.

    A layer or a donor that stands in the way is named in `notes`.
    """
    if model.checkpoint is None or model.folder is None or (model.folder / "adapter_config.json").is_file():
        return False
    if not isinstance(method, (TensorMethod, LayerMethod, BlockMethod)):
        return False
    if isinstance(method, TensorMethod) and method.every:
        other = _named_otherwise(model, donors)  # without one, the files' names say enough
        if other and notes is not None:
            notes.append(f"{method.name()} held all of {model.name} in memory and did not stream it: the files of {other} use other names")
        return not other
    skeleton = split_skeleton(model)
    if None in disk_names(model.checkpoint, skeleton).values():
        return False
    if isinstance(method, LayerMethod) and any(
        site.depth is None for site, _ in walk.choose(skeleton, anatomy_of(skeleton).sites(skeleton), method)
    ):
        return False  # what lies outside the blocks is copied, not worked on
    if isinstance(method, TensorMethod) or anatomy_of(skeleton).blocks(skeleton) is None:
        return isinstance(method, TensorMethod)
    why = revive(skeleton, model.config)
    if why and notes is not None:
        notes.append(f"{method.name()} held all of {model.name} in memory and did not stream it: {why}")
    return not why


def write(model: Model, method: Method, given: Given, folder: Path, *, overwrite: bool = False) -> Model:
    """Apply a method from the model's folder to a new one."""
    given.refuse_lacking(method)
    walk.refuse_marks(model, method)
    walk.refuse_strangers(model, method, given)
    _steady_memory()
    with torch.no_grad():
        if isinstance(method, TensorMethod):  # which looks at what it makes of every weight
            _write_tensors(model, method, given, folder, overwrite)
            return open(folder)
        check_readable(model)
        if isinstance(method, LayerMethod):
            _write_layers(model, method, given, folder, overwrite)
        else:
            assert isinstance(method, BlockMethod)
            _write_kept_blocks(model, method, given, folder, overwrite)
    return open(folder)


# Names


def split_skeleton(model: Model) -> nn.Module:
    """The empty module with every expert's matrices apart, as files have them."""
    skeleton = empty_module(model.config)
    split_experts(skeleton)
    return skeleton


def disk_names(checkpoint: Checkpoint, module: nn.Module) -> dict[str, str | None]:
    """Tensor name in the module -> name in the files; None where the files have no such tensor."""
    prefix = getattr(module, "base_model_prefix", "") + "."
    tied = getattr(module, "_tied_weights_keys", None) or {}
    config = getattr(module, "config", None)
    aliases = dict(tied) if isinstance(tied, dict) and getattr(config, "tie_word_embeddings", False) else {}
    aliases |= {target: source for source, target in aliases.items()}

    def on_disk(name: str) -> str | None:
        for candidate in (name, name.removeprefix(prefix), prefix + name):
            if candidate in checkpoint:
                return candidate
        return None

    found = {}
    for name in module.state_dict():
        found[name] = on_disk(name) or (on_disk(aliases[name]) if name in aliases else None)
    return found


def _named_otherwise(model: Model, donors: Sequence[Model]) -> str:
    """The first donor whose files have the model's tensors under other names, or more beside them; "" where there is none."""
    own = model.checkpoint
    others = [donor for donor in donors if donor.checkpoint and own and set(donor.checkpoint.names) != set(own.names)]
    if not others or not model.dense:
        return ""
    try:
        skeleton = split_skeleton(model)
    except ModelwrightError:
        return ""  # no module can be built, so that the files' names are all there is
    if any(None in disk_names(one.checkpoint, skeleton).values() for one in (model, *others) if one.checkpoint):
        return ""  # tensors are missing, which is said when the names are compared
    return others[0].name


def revive(module: nn.Module, config: Any) -> str:
    """Make the buffers that no file holds (rotary frequencies, position ids) real; say what prevents it, "" if nothing does."""
    stored = set(module.state_dict())
    for path, layer in list(module.named_modules()):
        lost = [leaf for leaf, value in layer._buffers.items()
                if value is not None and value.is_meta and f"{path}.{leaf}".lstrip(".") not in stored]  # fmt: skip
        if not lost:
            continue
        try:
            fresh = type(layer)(config)
            made = {leaf: fresh._buffers[leaf] for leaf in lost}
        except (TypeError, AttributeError, KeyError, ValueError) as error:  # it takes more than the config, or another one
            return f"the buffers of {path or 'the model'} cannot be made from the config alone ({type(error).__name__}: {error})"
        layer._buffers.update(made)
    return ""


# Tensor level


def _write_tensors(model: Model, method: TensorMethod, given: Given, folder: Path, overwrite: bool) -> None:
    checkpoint = model.checkpoint
    assert checkpoint is not None
    donors = [*given.donors, *([given.base] if given.base else [])]
    files = {id(donor): _files(donor) for donor in donors}
    kinds.refuse_other_shapes(
        {name: checkpoint.shape(name) for name in checkpoint.names},
        [(donor.name, {name: files[id(donor)].shape(name) for name in files[id(donor)].names}) for donor in donors],
    )
    if method.every:
        kinds.refuse_stored([model, *donors])
        skeleton, chosen, biases = None, {site.name: (site, local) for site, local in _every_tensor(checkpoint, method, given)}, {}
    else:
        skeleton = split_skeleton(model)
        names = disk_names(checkpoint, skeleton)
        found = walk.choose(skeleton, anatomy_of(skeleton).sites(skeleton), method, given.notes)
        found = walk.settled(skeleton, found, walk.divide(skeleton, found, method))
        chosen = {name: (site, local) for site, local in found if (name := names.get(site.name))}
        biases = {name: bias for name in chosen if (bias := f"{name.rpartition('.')[0]}.bias") in checkpoint}
    surveyed = walk.survey(method, given, lambda found: [_files(found).on_disk(name) for name in chosen], model)
    in_parts = {name for name in chosen if method.in_parts and checkpoint.nbytes(name) > LARGE}
    ahead = Ahead(checkpoint, [name for name in checkpoint.names if name in chosen and name not in in_parts])
    with Writer(folder, overwrite=overwrite, metadata=checkpoint.metadata or None) as out, ahead:
        for name in track(checkpoint.names, method.name()):
            _give_back()
            if name in biases.values():
                continue  # written with its weight
            if name not in chosen:
                out.copy(name, checkpoint)
                continue
            site, local = chosen[name]

            def read(source: Checkpoint, name: str = name, site: Site = site) -> Tensor:
                if name in in_parts:
                    return cast(Tensor, source.on_disk(name))
                found = ahead.read(name) if source is checkpoint else source.read(name)
                return found.T if site.transposed else found

            extras = walk.needed(local, given, site, lambda donor: read(files[id(donor)]), surveyed)
            weight = read(checkpoint)
            result = walk.call(local, weight, site, extras)
            made = result.state_dict().values() if isinstance(result, Stored) else [result] if isinstance(result, Tensor) else []
            if isinstance(weight, Tensor) and any(value.is_floating_point() and not_finite(value) for value in made):
                refuse_not_finite(model.name, {name: weight})  # of what is made, which takes less time to look at where it is packed
            with_it = biases.get(name)
            if not isinstance(result, Stored):
                out.add(name, result.T if site.transposed and isinstance(result, Tensor) else result)
                if with_it:
                    out.copy(with_it, checkpoint)
                continue
            assert skeleton is not None
            result.take_bias(nn.Parameter(checkpoint.read(with_it)) if with_it else None)
            for key, value in result.state_dict().items():
                out.add(f"{name.rpartition('.')[0]}.{key}", value)
            put(skeleton, site, result.to("meta"))
        stated = loading.quantization_config(skeleton) if skeleton is not None else None
        _write_beside(out, model, method, given, checkpoint.config, stated)


class Ahead:
    """Tensors of a checkpoint that are read in turn, each while what came before it is worked on; one is held for that."""

    def __init__(self, checkpoint: Checkpoint, names: Sequence[str]):
        self.checkpoint = checkpoint
        self._after = dict(itertools.pairwise(names))
        self._reader = ThreadPoolExecutor(1)
        self._next: tuple[str, Future[Tensor]] | None = None

    def read(self, name: str) -> Tensor:
        """Tensor `name`, in memory of its own."""
        waiting, self._next = self._next, None
        found = waiting[1].result() if waiting is not None and waiting[0] == name else self.checkpoint.read(name)
        if (after := self._after.get(name)) is not None:
            self._next = after, self._reader.submit(self.checkpoint.read, after)
        return found

    def __enter__(self) -> Ahead:
        return self

    def __exit__(self, *_: object) -> None:
        self._reader.shutdown(cancel_futures=True)


def _every_tensor(checkpoint: Checkpoint, method: Chooses, given: Given) -> walk.Chosen:
    """Every float tensor of the files, with its role by its name; no module is built."""
    anatomy = anatomy_of(checkpoint.config)
    placed = {name: anatomy.role(name) or ("linear", None) for name in checkpoint.names if checkpoint.dtype(name).is_floating_point}
    depths = 1 + max((depth for _, depth in placed.values() if depth is not None), default=-1)
    sites = [Site(name, name.rpartition(".")[0], role, depth, depths) for name, (role, depth) in placed.items()]
    return walk.choose(None, sites, method, given.notes)


def _files(model: Model) -> Checkpoint:
    if model.checkpoint is None:
        raise WeightsError(f"{model.name} is in memory, but this step streams from disk. Give its folder instead.")
    return model.checkpoint


# Layer and block level


class Streamed(Resident):
    """The walk over an empty module whose blocks are read from disk when their turn comes and dropped afterwards."""

    module: PreTrainedModel

    def __init__(self, model: Model, work: Path):
        assert model.checkpoint is not None
        self.model = model
        self.work = work
        self.checkpoint = model.checkpoint
        self.module = empty_module(model.config).eval()
        revive(self.module, model.config)
        self.anatomy = anatomy_of(self.module)
        self.path = self.anatomy.blocks(self.module)
        self.depths = len(self.stack)
        self.names = disk_names(self.checkpoint, split_skeleton(model))
        self.outside = [name for name in self.names if not name.startswith(f"{self.path}.")]
        self._hooks: list[Any] = []

    def load_outside(self, *, head: bool = True) -> None:
        """Have the tensors outside the blocks ready; without the head, large embeddings are read row by row as they are used."""
        left = set() if head else {site.name for site in self.anatomy.sites(self.module) if site.role == "head"} | self._embed_from_disk()
        fill(self.module, [name for name in self.outside if tensor_of(self.module, name).is_meta and name not in left], self._read)
        self.module.tie_weights()

    def _embed_from_disk(self) -> set[str]:
        """Let every large embedding read the rows that it is asked for; returns the names of their tables."""
        names = set()
        for site in self.anatomy.sites(self.module):
            table, found = self.module.get_submodule(site.module), self.names.get(site.name)
            if site.role == "embed" and isinstance(table, nn.Embedding) and found and self.checkpoint.nbytes(found) > LARGE:
                before, after = _row_hooks(self.checkpoint, found, table.weight, table.padding_idx)
                self._hooks += [table.register_forward_pre_hook(before), table.register_forward_hook(after)]
                names.add(site.name)
        return names

    def free_outside(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        fill(self.module, self.outside, lambda name: torch.empty_like(tensor_of(self.module, name), device="meta"))

    def load(self, depth: int) -> None:
        prefix = f"{self.path}.{depth}."
        with walk.split_experts(self.module, prefix):
            fill(self.module, [name for name in self.names if name.startswith(prefix)], self._read)

    def finish(self, depth: int) -> None:
        self.stack[depth].to("meta")
        _give_back()

    def _read(self, name: str) -> Tensor:
        found = self.names[name]
        assert found is not None
        return self.checkpoint.read(found)


def _row_hooks(checkpoint: Checkpoint, name: str, whole: Tensor, padding: int | None) -> tuple[Any, Any]:
    """What an embedding does before and after its forward so that it needs only the rows it is asked for, as stored under `name`."""

    def before(table: nn.Embedding, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        if not args:  # asked by keyword
            table.weight = nn.Parameter(checkpoint.read(name), requires_grad=False)
            return None
        ids, places = args[0].unique(return_inverse=True)
        rows = torch.cat([checkpoint.read_rows(name, row, row + 1) for row in ids.tolist()])
        table.weight, table.padding_idx = nn.Parameter(rows, requires_grad=False), None
        return places, *args[1:]

    def after(table: nn.Embedding, *_: Any) -> None:
        table.weight, table.padding_idx = whole, padding

    return before, after


def _write_layers(model: Model, method: LayerMethod, given: Given, folder: Path, overwrite: bool) -> None:
    work = given.work or Path(tempfile.mkdtemp(prefix=f"{folder.name}.work-", dir=_existing_parent(folder)))
    try:
        passage = Streamed(model, work)
        walk._change_layers(passage, method, given)
        with Writer(folder, overwrite=overwrite, metadata=passage.checkpoint.metadata or None) as out:
            stored = {name: passage.names[name] for name in passage.outside}
            for name in sorted(set(filter(None, stored.values()))):
                out.copy(name, passage.checkpoint)
            for depth in range(passage.depths):
                kept = Checkpoint(work / f"block-{depth:05d}")
                for name in kept.names:
                    out.copy(passage.names.get(name) or name, kept, name)
            _write_beside(out, model, method, given, passage.checkpoint.config, loading.quantization_config(passage.module))
    finally:
        if given.work is None:
            shutil.rmtree(work, ignore_errors=True)


def _write_kept_blocks(model: Model, method: BlockMethod, given: Given, folder: Path, overwrite: bool) -> None:
    passage = Streamed(model, folder)
    drop = walk._choose_blocks(passage, method, given)
    kept = [depth for depth in range(passage.depths) if depth not in drop]
    shorter = empty_module(model.config)
    removal.remove_blocks(shorter, drop)
    with Writer(folder, overwrite=overwrite, metadata=passage.checkpoint.metadata or None) as out:
        for name in sorted(set(filter(None, (passage.names[name] for name in passage.outside)))):
            out.copy(name, passage.checkpoint)
        for new, old in enumerate(kept):
            before = f"{passage.path}.{old}."
            for name, found in passage.names.items():
                if name.startswith(before):
                    assert found is not None
                    out.copy(found.replace(f".{old}.", f".{new}.", 1), passage.checkpoint, found)
        _write_beside(out, model, method, given, shorter.config.to_dict(), loading.quantization_config(shorter))


def _steady_memory() -> None:
    """Have the C library reuse the memory of slices, and give that of whole tensors back to the system when they go.

    Left alone, it clears every slice's memory anew, which takes longer than the arithmetic, and keeps tensors of up
    to 32 MB. Holds for the process from now on.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):  # where there is no glibc
        library = ctypes.CDLL(None)
        library.mallopt(M_TRIM_THRESHOLD, 1 << 26)
        library.mallopt(M_MMAP_THRESHOLD, (1 << 21) + (1 << 16))  # a slice in float64 takes a little more than 1 << 21


def _give_back() -> None:
    """Hand freed memory back to the system. The C library would keep it, in pieces too small for the next tensor."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def _existing_parent(folder: Path) -> Path:
    parent = folder.absolute().parent
    parent.mkdir(parents=True, exist_ok=True)
    return parent


def _write_beside(out: Writer, model: Model, method: Method, given: Given, config: dict[str, Any], stated: dict[str, Any] | None) -> None:
    """Config, tokenizer and record beside the streamed weights; `stated`: what the config says of stored layers."""
    assert model.folder is not None
    config = {key: value for key, value in config.items() if key != "quantization_config"}
    out.write_json("config.json", config | ({"quantization_config": stated} if stated else {}))
    for file in [*tokenizer_files(model.folder), model.folder / "generation_config.json"]:
        if file.is_file():
            out.copy_file(file)
    record = Model(name=model.name, folder=model.folder)
    record.marks = set(model.marks)
    record.history = list(model.history)
    walk.record(record, method, given)
    out.write_json(RECORD, {"steps": record.history, "marks": sorted(record.marks)})
    write_card(model.name, record.history, out.partial)

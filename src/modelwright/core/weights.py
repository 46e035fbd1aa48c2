"""Checkpoints on disk: read one tensor at a time, write one tensor at a time.

A safetensors file is eight bytes that hold the header's length N, N bytes of JSON that give each tensor's dtype,
shape and place, and the tensors' bytes without holes. `Checkpoint` reads the headers once and then exactly the
bytes that it is asked for, by plain reads and not through a memory map: mapped pages count as resident memory.
`Writer` puts each tensor straight on disk and shows the folder under its name only when it is whole.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import math
import os
import shutil
import threading
import weakref
from collections.abc import Callable, Container, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from modelwright.core import hub
from modelwright.core.errors import FiniteError, WeightsError, nearest, refuse
from modelwright.core.files import claim, explain_full_disk, partial_of, place_of, publish, read_json, refuse_existing, restore
from modelwright.maths.slices import Sliced, each

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "U16": torch.uint16,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "F32": torch.float32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
    "C64": torch.complex64,
}
CODES = {dtype: code for code, dtype in DTYPES.items()}
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
HUB_FILES = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja", "tokenizer*"]
LONGEST_HEADER = 100_000_000  # bytes, the limit of the safetensors library
SLICE = 1 << 26  # bytes that one read or write moves
CHECKED = 1 << 22  # values that one thread checks at a time
BEHIND = 1 << 27  # bytes written, after which they are sent to the disk beside other work
PIECE = 1 << 19  # bytes of them that are in memory, so few that they stay in the processor's cache
AGAIN = "Fetch or write it again."


class Place(NamedTuple):
    """Where a tensor stands: its file, its first byte there, and what the bytes mean."""

    file: Path
    start: int
    nbytes: int
    dtype: torch.dtype
    shape: tuple[int, ...]


class Checkpoint:
    """A model's tensors by name, read from disk one at a time.

    `source` is a folder, a .safetensors file, or a name on the Hugging Face hub (`revision` chooses a commit there).
    Opening reads only the headers and checks them all: a checkpoint that opens has every byte that it promises.
    Raises WeightsError with all the faults found.
    """

    def __init__(self, source: str | os.PathLike[str], revision: str | None = None):
        path = _locate(source, revision)
        self.path = path if path.is_dir() else path.parent
        self._places: dict[str, Place] = {}
        files, index = _files(path)
        notes = index.get("metadata", {})
        self.metadata: dict[str, str] = {key: text for key, text in notes.items() if isinstance(text, str)}
        faults: list[str] = []
        for file in files:
            try:
                metadata, places = read_header(file)
            except WeightsError as error:
                faults.append(str(error))
                continue
            self.metadata |= metadata
            if index:
                promised = {name for name, place in index["weight_map"].items() if path / place == file}
                faults += _index_faults(file, set(places), promised)
            self._places |= places
        refuse(WeightsError, faults)
        self.names = list(self._places)

    def __contains__(self, name: object) -> bool:
        return name in self._places

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def __repr__(self) -> str:
        nbytes = sum(place.nbytes for place in self._places.values())
        return f"Checkpoint({str(self.path)!r}: {len(self)} tensors, {nbytes:,} bytes)"

    def place(self, name: str) -> Place:
        """Where tensor `name` stands on disk. Raises WeightsError when there is none of this name."""
        if name not in self._places:
            raise WeightsError(f"Tensor {name!r} was asked for, but {self.path} has none.{nearest(name, self._places)}")
        return self._places[name]

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of tensor `name`."""
        return self.place(name).shape

    def dtype(self, name: str) -> torch.dtype:
        """The dtype of tensor `name`."""
        return self.place(name).dtype

    def nbytes(self, name: str) -> int:
        """The bytes that tensor `name` takes on disk."""
        return self.place(name).nbytes

    def read(self, name: str) -> Tensor:
        """Tensor `name`, in memory of its own."""
        place = self.place(name)
        return _read(place, 0, place.nbytes).view(place.dtype).view(place.shape)

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows `start` to `stop` (not included) of the first dimension of tensor `name`; only their bytes are read."""
        place = self.place(name)
        if not place.shape or not 0 <= start <= stop <= place.shape[0]:
            raise WeightsError(f"Rows {start} to {stop} of {name!r} were asked for; its shape is {list(place.shape)}.")
        row = place.nbytes // place.shape[0] if place.shape[0] else 0
        rows = _read(place, start * row, (stop - start) * row)
        return rows.view(place.dtype).view(stop - start, *place.shape[1:])

    def on_disk(self, name: str) -> OnDisk:
        """Tensor `name`, to be read a slice at a time."""
        return OnDisk(self.place(name))

    @property
    def ties(self) -> dict[str, str]:
        """Names that share a stored tensor: {alias: name of the tensor stored}."""
        return {alias: name for alias, name in self.metadata.items() if name in self and alias not in self}

    @functools.cached_property
    def config(self) -> dict[str, Any]:
        """The content of config.json, or {} where there is none. Raises WeightsError when it is not a JSON object."""
        file = self.path / "config.json"
        return read_json(file, WeightsError, AGAIN) if file.is_file() else {}


class _Opened:
    """A file that is open for as long as someone reads from it; all its tensors share it, as systems allow few open files."""

    known: ClassVar[weakref.WeakValueDictionary[tuple[int, int], _Opened]] = weakref.WeakValueDictionary()

    def __init__(self, descriptor: int):
        self.descriptor = descriptor
        weakref.finalize(self, os.close, descriptor)

    @classmethod
    def of(cls, file: Path) -> _Opened:
        """The open file; one that was written anew in its place is another."""
        stands = os.stat(file)
        found = cls.known.get((stands.st_dev, stands.st_ino))
        if found is None:
            found = cls.known[stands.st_dev, stands.st_ino] = cls(os.open(file, os.O_RDONLY))
        return found


class OnDisk:
    """A stored tensor, read by slices of its flattened entries: x[start:stop]; memory never holds the whole.

    A slice that a thread asks for again, as a formula does that needs it twice, is not read again: it is not to be changed.
    """

    def __init__(self, place: Place):
        self.place = place
        self.shape, self.dtype = place.shape, place.dtype
        self._last = threading.local()
        self._file = _Opened.of(place.file)

    def __getitem__(self, at: slice) -> Tensor:
        size = self.dtype.itemsize
        start, stop, step = at.indices(math.prod(self.shape))
        assert step == 1, at
        if getattr(self._last, "at", None) != (start, stop):
            values = torch.empty(max(0, stop - start), dtype=self.dtype)
            _fill(self._file.descriptor, self.place.file, values.view(torch.uint8), self.place.start + start * size)
            self._last.values, self._last.at = values, (start, stop)
        return self._last.values


def read_header(file: Path) -> tuple[dict[str, str], dict[str, Place]]:
    """Read and check the header of one safetensors file; no tensor is read.

    Returns (metadata, {name: place}) in the order of the bytes. Raises WeightsError with all the faults found.
    """
    size = file.stat().st_size
    with open(file, "rb", buffering=0) as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(size - 8, LONGEST_HEADER):
            raise WeightsError(
                f"{file} is no whole safetensors file: its header should take {length:,} bytes and the file has "
                f"{size:,}. Fetch or write it again."
            )
        text = stream.read(length)
    try:
        header = json.loads(text, object_pairs_hook=_no_repeats)
        if not isinstance(header, dict):
            raise ValueError("it is no JSON object")
        metadata = header.pop("__metadata__", None) or {}
        if not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("its metadata are not all text")
        entries = {name: _entry(name, entry) for name, entry in header.items()}
    except (ValueError, AttributeError, RecursionError) as error:
        raise WeightsError(f"{file} has a corrupt header: {error}. Fetch or write it again.") from None

    faults = []
    places = {}
    end = 0
    for name, (code, shape, start, stop) in sorted(entries.items(), key=lambda item: item[1][2:]):
        dtype = DTYPES.get(code)
        if dtype is None:
            faults.append(f"{file}: {name!r} has the dtype {code!r}, which is unknown; known are {', '.join(DTYPES)}.")
        elif stop - start != math.prod(shape) * dtype.itemsize:
            faults.append(f"{file}: {name!r} of shape {shape} and dtype {code} cannot fill bytes {start} to {stop}.")
        else:
            places[name] = Place(file, 8 + length + start, stop - start, dtype, tuple(shape))
        if start != end:
            gap = "overlaps with the tensor" if start < end else f"leaves {start - end:,} bytes unused"
            faults.append(f"{file}: {name!r} {gap} before it.")
        end = max(end, stop)
    held = size - 8 - length
    if end > held:
        faults.append(f"{file} is truncated: its tensors take {end:,} bytes and it holds {held:,}. Fetch it again.")
    elif end < held:
        faults.append(f"{file} holds {held - end:,} bytes after its last tensor.")
    refuse(WeightsError, faults)
    return metadata, places


def check_finite(checkpoint: Checkpoint, progress: Callable[[int, int], None] | None = None, *, only: Container[str] | None = None) -> None:
    """Read every floating-point tensor, a slice at a time, and refuse the checkpoint when one holds NaN or infinity.

    `progress` is called as progress(bytes done, bytes in all). only: the names of the tensors to read. Raises WeightsError naming the
    tensors and counts.
    """
    names = [name for name in checkpoint if _is_float(checkpoint.dtype(name)) and (only is None or name in only)]
    total = sum(checkpoint.nbytes(name) for name in names)
    done = 0
    faults = []
    for name in names:
        place = checkpoint.place(name)
        bad = sum(each(functools.partial(_stored_not_finite, place), math.prod(place.shape), CHECKED))
        done += place.nbytes
        if progress:
            progress(done, total)
        if bad:
            faults.append(f"{name} has {bad:,} values of {math.prod(place.shape):,} that are NaN or infinite")
    if faults:
        raise WeightsError(f"{checkpoint.path} is not finite: {'; '.join(faults)}. Fetch it again, or train it again in a wider dtype.")


def _stored_not_finite(place: Place, at: slice) -> int:
    """How many of a stored tensor's values at a slice are NaN or infinite; read into one small buffer."""
    step = PIECE // place.dtype.itemsize
    buffer, bad = torch.empty(min(step, at.stop - at.start), dtype=place.dtype), 0
    with open(place.file, "rb", buffering=0) as file:
        for start in range(at.start, at.stop, step):
            part = buffer[: min(step, at.stop - start)]
            _fill(file.fileno(), place.file, part.view(torch.uint8), place.start + start * place.dtype.itemsize)
            bad += not_finite(part)
    return bad


def not_finite(values: Tensor) -> int:
    """How many values are NaN or infinite. One sum tells whether any can be: both stay in it."""
    values = torch.view_as_real(values) if values.dtype.is_complex else values
    values = values.to(torch.bfloat16) if values.dtype.itemsize == 1 else values
    if values.sum(dtype=torch.float32 if values.dtype == torch.float16 else values.dtype).isfinite():  # the others hold a sum of all
        return 0
    return int((~values.isfinite()).sum())


def _finite(name: str, tensor: Sliced, at: slice) -> Tensor:
    """A slice of a computed tensor. Raises FiniteError where it holds NaN or infinity."""
    part = tensor[at]
    if _is_float(part.dtype) and not_finite(part):
        raise FiniteError(
            f"{name!r} would hold NaN or infinity. Where what it is computed from is finite, a sum is too large for "
            f"{tensor.dtype}: give smaller weights or a smaller scale, or save in a wider dtype."
        )
    return part


class Writer:
    """Write a checkpoint folder tensor by tensor; the folder appears under its name only when it is whole.

        with Writer("small/") as out:
            out.add("lm_head.weight", tensor)
            out.copy("norm.weight", checkpoint)
            out.write_json("config.json", config)

    Each tensor goes to disk as it comes, so that memory holds one tensor. What is unfinished stands in
    `<folder>.partial`; on leaving, everything is flushed to disk and the folder renamed. On an error the partial
    folder is removed. With `keep_partial` it stays instead, and the next Writer on the same folder with `keep_partial`
    goes on from the shards that were whole: `names` says what is stored.

    folder: where to write. It must be absent or empty, unless `overwrite`; then the new folder takes its name, and the
        old one is removed (see `core.files`).
    shard_bytes: a file grows to at most this size, unless one tensor is larger.
    metadata: text values for the files' headers.

    Raises WeightsError when the folder is taken or the disk is full.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        shard_bytes: int = 5_000_000_000,
        metadata: dict[str, str] | None = None,
        overwrite: bool = False,
        keep_partial: bool = False,
    ):
        refuse_existing(folder, overwrite=overwrite, error=WeightsError)
        self.folder = place_of(folder)
        self.partial = partial_of(self.folder)
        self.shard_bytes = shard_bytes
        self.metadata = {"format": "pt"} if metadata is None else dict(metadata)
        self.overwrite = overwrite
        self.keep_partial = keep_partial
        self.names: set[str] = set()
        self.ties: dict[str, str] = {}
        self._shards: list[dict[str, int]] = []  # of each whole shard: {name: bytes}
        self._shard: _Shard | None = None
        left = self.partial.exists()
        claim(self.partial, keep=keep_partial)
        if left and keep_partial:
            self._adopt()

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind, error, trace) -> None:
        try:
            if error is None:
                self._finish()
                return
        except BaseException as late:
            self._abandon()
            explain_full_disk(late, self.folder)
            raise
        self._abandon()
        explain_full_disk(error, self.folder)

    def add(self, name: str, tensor: Tensor | Sliced) -> None:
        """Store `tensor` under `name`; a sliced one is computed as it is written.

        Raises WeightsError when its dtype has no place in safetensors, and FiniteError when a sliced one is not finite.
        """
        if tensor.dtype not in CODES:
            raise WeightsError(f"{name!r} has the dtype {tensor.dtype}, which safetensors cannot store.")
        count, size = math.prod(tensor.shape), tensor.dtype.itemsize
        shard = self._room_for(name, count * size)
        if count * size % 8:
            parts = [tensor] if isinstance(tensor, Tensor) else each(functools.partial(_finite, name, tensor), count)
            shard.late[name] = (tensor.dtype, tuple(tensor.shape), torch.cat([_bytes(part) for part in parts]))
            return
        start = shard.enter(name, tensor.dtype, tensor.shape, count * size)
        if isinstance(tensor, Tensor):
            _write(shard.file, _bytes(tensor), start)
            return

        def store(at: slice) -> None:
            """Compute and write a slice, so that no other core has to fetch it."""
            _write(shard.file, _bytes(_finite(name, tensor, at)), start + at.start * size)

        for _ in each(store, count):
            pass

    def copy(self, name: str, checkpoint: Checkpoint, source: str | None = None) -> None:
        """Copy tensor `name` from another checkpoint (there named `source`, if that differs), byte for byte."""
        place = checkpoint.place(source or name)
        shard = self._room_for(name, place.nbytes)
        if place.nbytes % 8:
            shard.late[name] = (place.dtype, place.shape, _read(place, 0, place.nbytes))
        else:
            start = shard.enter(name, place.dtype, place.shape, place.nbytes)
            with open(place.file, "rb", buffering=0) as file:
                shard.file.seek(start)
                _copy_bytes(file, place.start, shard.file, place.nbytes)

    def tie(self, alias: str, name: str) -> None:
        """Say that `alias` is the stored tensor `name`, as safetensors' save_model does: in the file's metadata."""
        self.ties[alias] = name

    def write_json(self, name: str, content: Any) -> None:
        """Write `content` as the JSON file `name`."""
        (self.partial / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    def copy_file(self, path: str | os.PathLike[str]) -> None:
        """Copy a file, such as a tokenizer's, under its own name."""
        shutil.copyfile(path, self.partial / Path(path).name)

    def _adopt(self) -> None:
        for file in [*self.partial.glob("*.moved"), *self.partial.glob("*.index.json")]:
            file.unlink()
        for file in sorted(self.partial.glob("*.safetensors")):
            try:
                _, places = read_header(file)
            except WeightsError:  # the shard that was being written
                file.unlink()
                continue
            file.rename(self._shard_path(len(self._shards)))
            self._shards.append({name: place.nbytes for name, place in places.items()})
            self.names |= set(places)

    def _shard_path(self, number: int) -> Path:
        return self.partial / f"shard-{number:05d}.safetensors"

    def _room_for(self, name: str, nbytes: int) -> _Shard:
        assert name not in self.names, f"tensor {name!r} is written twice"
        self.names.add(name)
        if self._shard and not self._shard.takes(nbytes, self.shard_bytes):
            self._close_shard()
        if self._shard is None:
            self._shard = _Shard(self._shard_path(len(self._shards)))
        return self._shard

    def _close_shard(self, ties: dict[str, str] | None = None) -> None:
        if self._shard:
            self._shards.append(self._shard.close(self.metadata | (ties or {})))
            self._shard = None

    def _finish(self) -> None:
        loose = {alias: name for alias, name in self.ties.items() if name not in self.names or alias in self.names}
        assert not loose, f"ties to tensors that were not written, or of tensors that were: {loose}"
        if self._shard is None and (self.ties or not self._shards):
            self._shard = _Shard(self._shard_path(len(self._shards)))
        self._close_shard(self.ties)
        self._name_shards()
        refuse_existing(self.folder, overwrite=self.overwrite, error=WeightsError)
        publish(self.partial, self.folder)

    def _name_shards(self) -> None:
        count = len(self._shards)
        if count == 1:
            self._shard_path(0).rename(self.partial / "model.safetensors")
            return
        weight_map: dict[str, str] = {}
        for number, sizes in enumerate(self._shards):
            file = f"model-{number + 1:05d}-of-{count:05d}.safetensors"
            self._shard_path(number).rename(self.partial / file)
            weight_map |= dict.fromkeys(sizes, file)
        total = sum(sum(sizes.values()) for sizes in self._shards)
        index = {"metadata": {"total_size": total, **self.ties}, "weight_map": weight_map}
        self.write_json("model.safetensors.index.json", index)

    def _abandon(self) -> None:
        if self._shard:
            with contextlib.suppress(OSError):  # another error is on its way
                self._shard.stop()
            self._shard.file.close()
        if not self.keep_partial:
            shutil.rmtree(self.partial, ignore_errors=True)


class _Shard:
    """One safetensors file being written. Its header comes last, into room that was left for it at the front.

    A tensor whose size is no multiple of 8 would leave its successors misaligned, which some readers refuse; it
    waits in `late` for the end of the file, where such tensors stand in order of falling item size.
    """

    ROOM = 1 << 20  # bytes left for the header: about 9,000 tensors
    MOST_LATE = SLICE  # bytes that may wait in memory

    def __init__(self, path: Path):
        self.path = path
        self.file = open(path, "w+b", buffering=0)  # noqa: SIM115
        self.entries: dict[str, dict[str, Any]] = {}
        self.late: dict[str, tuple[torch.dtype, tuple[int, ...], Tensor]] = {}
        self.size = 0
        self.header_size = 0
        self._flusher = ThreadPoolExecutor(1)
        self._flushing: Future[None] | None = None
        self._flushed = 0  # bytes, when it last began

    def takes(self, nbytes: int, shard_bytes: int) -> bool:
        """Whether one more tensor of `nbytes` fits into this file of at most `shard_bytes`."""
        waiting = sum(data.nbytes for *_, data in self.late.values())
        fits = self.size + waiting + nbytes <= shard_bytes or self.size + waiting == 0
        return fits and waiting < self.MOST_LATE and self.header_size + 1000 * len(self.late) < self.ROOM * 3 // 4

    def enter(self, name: str, dtype: torch.dtype, shape: tuple[int, ...] | torch.Size, nbytes: int) -> int:
        """Note in the header a tensor whose bytes follow now; returns where in the file they begin."""
        end = self.size + nbytes
        entry = {"dtype": CODES[dtype], "shape": list(shape), "data_offsets": [self.size, end]}
        self.entries[name] = entry
        self.header_size += len(json.dumps({name: entry}))
        self._flush_behind()
        self.size = end
        return self.ROOM + end - nbytes

    def _flush_behind(self) -> None:
        """Have what was written so far go to the disk while more is computed, so that little waits for it at the end."""
        if self.size - self._flushed < BEHIND or self._flushing and not self._flushing.done():
            return
        if self._flushing:
            self._flushing.result()  # an error is told only once
        self._flushed = self.size
        self._flushing = self._flusher.submit(os.fsync, self.file.fileno())

    def stop(self) -> None:
        """Wait for what goes to the disk; raises what went wrong."""
        self._flusher.shutdown()
        if self._flushing:
            self._flushing.result()

    def close(self, metadata: dict[str, str]) -> dict[str, int]:
        """Write what waits and the header, flush to disk; returns {name: bytes}."""
        for name, (dtype, shape, data) in sorted(self.late.items(), key=lambda item: -item[1][0].itemsize):
            _write(self.file, data, self.enter(name, dtype, shape, data.nbytes))
        self.stop()
        header = json.dumps({"__metadata__": metadata} | self.entries, separators=(",", ":")).encode()
        header += b" " * (-len(header) % 8)
        room = self.ROOM - 8
        if len(header) > room or self.size < self.ROOM * 100:  # a small file, so moving it costs little
            room = len(header)
            self._move_data(8 + room)
        front = bytearray(room.to_bytes(8, "little") + header.ljust(room))
        _write(self.file, torch.frombuffer(front, dtype=torch.uint8), 0)
        os.fsync(self.file.fileno())
        self.file.close()
        return {name: entry["data_offsets"][1] - entry["data_offsets"][0] for name, entry in self.entries.items()}

    def _move_data(self, start: int) -> None:
        moved = self.path.with_suffix(".moved")
        with open(moved, "w+b", buffering=0) as target:
            target.seek(start)
            _copy_bytes(self.file, self.ROOM, target, self.size)
            self.file.close()
        os.replace(moved, self.path)
        self.file = open(self.path, "r+b", buffering=0)  # noqa: SIM115


def _locate(source: str | os.PathLike[str], revision: str | None) -> Path:
    path = Path(os.path.expanduser(source))
    restore(path.absolute())
    restore(path.absolute().parent)  # a fit's folder has the model inside
    if path.is_dir() or (path.suffix == ".safetensors" and path.is_file()):
        return path.absolute()
    if path.exists() or not isinstance(source, str) or path.suffix == ".safetensors":
        hint = hub.nearest_path(str(source))
        raise WeightsError(f"A checkpoint at {source} was asked for, but there is no such folder or .safetensors file.{hint}")
    return hub.fetch(source, HUB_FILES, what="A checkpoint", error=WeightsError, revision=revision)


def _files(path: Path) -> tuple[list[Path], dict[str, Any]]:
    """The safetensors files of a checkpoint, and the content of its index, {} without one."""
    if path.is_file():
        return [path], {}
    single = path / "model.safetensors"
    file = path / "model.safetensors.index.json"
    found = sorted(path.glob("*.safetensors"))
    if not single.exists() and file.is_file():
        index = {"metadata": {}} | read_json(file, WeightsError, AGAIN)
        shards = index["weight_map"].values() if isinstance(index.get("weight_map"), dict) else [None]
        if not all(isinstance(name, str) for name in shards) or not isinstance(index["metadata"], dict):
            raise WeightsError(f"{file} has no weight_map from tensor names to file names. Fetch or write it again.")
        names = dict.fromkeys(shards)
        refuse(WeightsError, [fault for name in names if (fault := _path_fault(path, name))])
        return [path / name for name in names], index
    if single in found:
        found = [single]
    if len(found) == 1:
        refuse(WeightsError, [fault] if (fault := _path_fault(path, found[0].name)) else [])
        return found, {}
    if found:
        raise WeightsError(
            f"{path} has {len(found)} safetensors files and no model.safetensors.index.json that says which make the "
            f"model ({', '.join(file.name for file in found[:4])}, ...). Fetch the index, or name one file."
        )
    pickles = sorted(file.name for pattern in PICKLES for file in path.glob(pattern))
    if pickles:
        raise WeightsError(
            f"{path} has only pickled weights ({', '.join(pickles[:4])}). A pickle can run any code as it loads, so "
            "pickles are never loaded. If you trust it, convert it with transformers: "
            "AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder), and open the new folder."
        )
    raise WeightsError(f"{path} was opened as a checkpoint, but holds no .safetensors file.")


def _path_fault(folder: Path, name: str) -> str | None:
    """What is wrong with a weight file's name in a folder: outside of it, or missing."""
    root = folder.resolve()
    allowed = [root]
    if root.parent.name == "snapshots":  # the hub's cache: snapshots/<commit>/x links to blobs/<hash>
        allowed.append(root.parent.parent / "blobs")
    target = (root / name).resolve()
    if Path(name).is_absolute() or ".." in Path(name).parts or not any(target.is_relative_to(a) for a in allowed):
        return f"{folder} names the weight file {name!r}, which lies outside the folder. Copy it in, if you trust it."
    if not target.is_file():
        return f"{folder} lacks the weight file {name!r}. Fetch it again."
    return None


def _is_float(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point or dtype.is_complex


def _index_faults(file: Path, held: set[str], promised: set[str]) -> list[str]:
    lacking, extra = sorted(promised - held), sorted(held - promised)
    faults = []
    if lacking:
        faults.append(f"{file} lacks {len(lacking)} tensors that the index places there, such as {lacking[0]!r}.")
    if extra:
        faults.append(f"{file} holds {len(extra)} tensors that the index does not place there, such as {extra[0]!r}.")
    return faults


def _entry(name: str, entry: Any) -> tuple[str, list[int], int, int]:
    try:
        code, shape, (start, stop) = entry["dtype"], entry["shape"], entry["data_offsets"]
        good = isinstance(code, str) and all(type(n) is int and n >= 0 for n in [*shape, start, stop]) and start <= stop
    except (TypeError, KeyError, ValueError):
        good = False
    if not good:
        raise ValueError(f"the entry of {name!r} is {str(entry)[:200]}")
    return code, shape, start, stop


def _no_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        raise ValueError("a name stands in it twice")
    return content


def _read(place: Place, offset: int, count: int) -> Tensor:
    """`count` bytes of a tensor from byte `offset` of it, as a new uint8 tensor."""
    data = torch.from_numpy(np.empty(count, np.uint8)).as_strided((count,), (1,))  # numpy asks for large pages, which are given sooner
    with open(place.file, "rb", buffering=0) as file:
        _fill(file.fileno(), place.file, data, place.start + offset)
    return data


def _fill(descriptor: int, file: Path, data: Tensor, start: int) -> None:
    """Read as many bytes as a uint8 tensor holds, from `start` of an open file; threads may read beside each other."""
    view = memoryview(data.numpy())  # type: ignore[arg-type]
    done = 0
    while done < len(view):
        got = os.preadv(descriptor, [view[done : done + SLICE]], start + done)
        if not got:
            raise _shortened(file)
        done += got


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().resolve_conj().resolve_neg().cpu().contiguous().reshape(-1).view(torch.uint8)


def _write(file, data: Tensor, start: int) -> None:
    """Write a uint8 tensor to where `start` is in the file; threads may write beside each other."""
    view = memoryview(data.numpy())  # type: ignore[arg-type]
    done = 0
    while done < len(view):
        done += os.pwrite(file.fileno(), view[done : done + SLICE], start + done)


def _copy_bytes(source, start: int, target, count: int) -> None:
    """Copy `count` bytes of `source` from `start` to where `target` stands, inside the kernel when it can."""
    source.seek(start)
    while count and hasattr(os, "copy_file_range"):
        try:
            got = os.copy_file_range(source.fileno(), target.fileno(), min(count, 1 << 30))
        except OSError as error:
            if error.errno in (errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM):
                break
            raise
        if not got:
            break
        count -= got
    while count:
        data = source.read(min(count, SLICE // 4))
        if not data:
            raise _shortened(source.name)
        count -= len(data)
        view = memoryview(data)
        while view:
            view = view[target.write(view) :]


def _shortened(file: Path | str) -> WeightsError:
    return WeightsError(f"{file} became shorter after it was opened. Nothing may write to it meanwhile.")

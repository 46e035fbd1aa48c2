"""A fine-tuned model as the coded change of its base, a few hundredths of its bytes, for those who have the base.

    import modelwright as mw

    mw.pack_delta("tuned/", "base/", save="change/")
    mw.unpack_delta("change/", "base/", save="tuned-again/")

The codec is `encode.compeft` (Yadav et al. 2023, arXiv:2311.13171) unless another is given, such as `encode.fedzip`. The folder
holds the parts of each tensor's change as safetensors, `name.part` (see `maths.few_values.encode`), whole tensors under their own
names where the codec leaves them out and they differ from the base's, the model's config and tokenizer, and `delta.json`: the
codec, what each change needs to be read, and a checksum of the base.
"""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .core import kinds, stream, walk
from .core.errors import WeightsError
from .core.files import refuse_inputs
from .core.given import Given
from .core.model import Model, check_readable, copy_beside, files_of, open
from .core.progress import console, track
from .core.weights import Checkpoint, Writer
from .maths import few_values
from .maths.slices import slices
from .maths.task_vectors import onto

if TYPE_CHECKING:
    from .methods.encode._mechanism import DeltaCodec

RECORD = "delta.json"


def pack_delta(model: Any, base: Any, *, save: str | Path, codec: DeltaCodec | None = None, overwrite: bool = False) -> Path:
    """Write what a model has learned beyond its base, coded.

    model, base: folders or hub names, with the same tensors. codec: `encode.compeft` or `encode.fedzip` with settings; tensors that its
    `where` and `skip` leave out are stored whole where they differ from the base's.

    Returns the folder. Raises a subclass of ModelwrightError, before anything is written, for models that cannot be packed.
    """
    from .methods.encode._mechanism import change_of
    from .methods.encode.compeft import Compeft

    codec, end, start = codec or Compeft(), open(model), open(base)
    given = Given(base=start)
    walk.refuse_strangers(end, codec, given)
    kinds.refuse_stored([end, start])
    own, before = (files_of(one) for one in (end, start))
    shapes = [{name: one.shape(name) for name in one.names} for one in (before, own)]
    kinds.refuse_other_shapes(shapes[0], [(end.name, shapes[1])])
    chosen = sorted(site.name for site, _ in stream._every_tensor(own, codec, given))
    refuse_inputs(Path(save), [own.path, before.path])
    for one in (end, start):
        check_readable(one)
    tensors: dict[str, Any] = {}
    with Writer(save, metadata=own.metadata, overwrite=overwrite) as out:
        changes = {name: change_of(before.on_disk(name), own.on_disk(name)) for name in chosen}
        for name, change in codec.coded(changes):
            parts, tensors[name] = few_values.encode(change, codec.code)
            for part, values in parts.items():
                out.add(f"{name}.{part}", values)
        for name in own.names:
            if name not in tensors and not _equal(own, before, name):
                out.copy(name, own)
        copy_beside(out, own)
        record = {"codec": {codec.name(): codec.settings()}, "base": start.name, "checksum": _checksum(before), "notes": given.notes}
        out.write_json(RECORD, record | {"tensors": tensors})
    for note in given.notes:
        console.print(f"note: {note}", markup=False)
    return Path(save)


def unpack_delta(folder: str | Path, base: Any, *, save: str | Path, overwrite: bool = False) -> Model:
    """Write the model that a coded change gives with its base, θ0 + τ̂: sums in float32 (of float64 models in float64), rounded once.

    folder: as `pack_delta` wrote it. base: the model that it was packed against. save: the folder to write.

    Returns the model. Raises WeightsError when the folder is not one of `pack_delta`, is damaged, or the base is another one.
    """
    place, before = Path(folder), files_of(open(base))
    if not (place / RECORD).is_file():
        raise WeightsError(f"{folder} has no {RECORD}: it is not a folder that `pack_delta` wrote. Name one that is.")
    record, packed = json.loads((place / RECORD).read_text("utf-8")), Checkpoint(place)
    refuse_inputs(Path(save), [place, before.path])
    if _checksum(before) != record["checksum"]:
        raise WeightsError(f"{folder} was packed against {record['base']}, and {base} has other weights. Name that base.")
    with Writer(save, metadata=packed.metadata, overwrite=overwrite) as out:
        for name in track(before.names, "unpack"):
            if numbers := record["tensors"].get(name):
                parts = {part: packed.read(f"{name}.{part}") for part in few_values.parts_of(numbers["code"])}
                change = few_values.decode(parts, numbers, math.prod(before.shape(name)))
                out.add(name, onto(before.on_disk(name), change.read, 1.0))
            else:
                out.copy(name, packed if name in packed else before)
        copy_beside(out, packed)
    return open(save)


def _equal(one: Checkpoint, two: Checkpoint, name: str) -> bool:
    """Whether both have the same bits under a name."""
    sides = [checkpoint.on_disk(name) for checkpoint in (one, two)]
    parts = slices(math.prod(one.shape(name)))
    return sides[0].dtype == sides[1].dtype and all(
        torch.equal(*(side[at].contiguous().view(torch.uint8) for side in sides)) for at in parts
    )


def _checksum(checkpoint: Checkpoint) -> str:
    """SHA-256 of all tensors' names, dtypes, shapes and bytes, in the order of the names."""
    found = hashlib.sha256()
    for name in sorted(checkpoint.names):
        found.update(f"{name} {checkpoint.dtype(name)} {checkpoint.shape(name)}\n".encode())
        stored = checkpoint.on_disk(name)
        for at in slices(math.prod(checkpoint.shape(name)), 1 << 22):
            found.update(stored[at].contiguous().view(torch.uint8).numpy())  # type: ignore[arg-type]
    return found.hexdigest()

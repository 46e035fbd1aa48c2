"""Many fine-tuned models in little more than two: their base, one merged change, and one bit for each entry and task.

    import modelwright as mw

    mw.pack_tasks("base/", ["code/", "prose/"], save="packed/")
    mw.unpack_task("packed/", "code", save="code-again/")

Wang et al. 2024, arXiv:2405.07813, section 4.2: task i is served by θ0 + τ_M ⊙ m_i, which is near to its own θ0 + τ_i.
The folder holds `base/`, a model as any other; `change/`, τ_M in the base's dtype, and `mask-0/`, `mask-1/` and so on, one for each
task, as safetensors with the base's names; and `tasks.json`, with the tasks' names, the method and what the user should know. A mask
is uint8 [ceil(n / 8)] of n flattened entries, entry 8k + j in bit j of byte k (numpy.unpackbits with bitorder "little").
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .core import kinds, stream, walk
from .core.errors import SettingError, WeightsError, nearest
from .core.files import refuse_inputs, whole_folder, write_json
from .core.given import Given
from .core.model import Model, check_readable, copy_beside, files_of, open
from .core.progress import console, track
from .core.weights import Checkpoint, Writer
from .maths import slices
from .maths.bits import packed, unpacked
from .maths.slices import Entries, Sliced, Values, flat
from .maths.task_vectors import onto
from .methods.merge.consensus import Consensus

RECORD = "tasks.json"


def pack_tasks(base: Any, donors: Sequence[Any], *, save: str | Path, method: Consensus | None = None, overwrite: bool = False) -> Path:
    """Write the models that were fine-tuned from `base` as its merged change and a mask for each.

    base, donors: folders or hub names, with the same tensors. method: how changes are merged and what a donor needs, by its
    settings but `agree` and `scale`; `merge.tall_masks` finds `least_each` on text. Tensors that its `where` and `skip` leave
    out are the base's in every task; what the user should know of that is told, and stands in `tasks.json` under `notes`.

    Returns the folder.
    Raises a subclass of ModelwrightError, before anything is written, for models that cannot be packed.
    """
    method, start, ends = method or Consensus(), open(base), [open(donor) for donor in donors]
    if len(ends) < 2:
        raise SettingError(f"pack_tasks takes two donors or more; got {len(ends)}. One model alone is smallest as it is.")
    walk.refuse_strangers(start, method, Given(donors=ends))
    kinds.refuse_stored([start, *ends])
    files = [files_of(one) for one in (start, *ends)]
    shapes = [{name: one.shape(name) for name in one.names} for one in files]
    kinds.refuse_other_shapes(shapes[0], [(donor.name, found) for donor, found in zip(ends, shapes[1:], strict=True)])
    given = Given()
    chosen = {site.name: local for site, local in stream._every_tensor(files[0], method, given)}
    method.refuse_other_numbers(len(ends))
    refuse_inputs(Path(save), [one.path for one in files])
    for model in (start, *ends):
        check_readable(model)
    with whole_folder(Path(save), overwrite=overwrite) as folder:
        with Writer(folder / "base", metadata=files[0].metadata or None) as out:
            for name in files[0].names:
                out.copy(name, files[0])
            copy_beside(out, files[0])

        def parts(name: str, number: int) -> tuple[Values, Values]:
            return chosen[name].mask(files[0].on_disk(name), [one.on_disk(name) for one in files[1:]], number)

        with Writer(folder / "change") as out:
            for name in track(list(chosen), "change"):
                out.add(name, Sliced(files[0].shape(name), files[0].dtype(name), parts(name, 0)[0]))
        for number, donor in enumerate(ends):
            with Writer(folder / f"mask-{number}") as out:
                for name in track(list(chosen), donor.name):
                    out.add(name, _bits(parts(name, number)[1], math.prod(files[0].shape(name))))
        record = {"tasks": [Path(donor.name).name for donor in ends], "method": {method.name(): method.settings()}, "notes": given.notes}
        write_json(folder / RECORD, record)
    for note in given.notes:
        console.print(f"note: {note}", markup=False)
    return Path(save)


def unpack_task(folder: str | Path, task: int | str, *, save: str | Path, overwrite: bool = False) -> Model:
    """Write the model of one task, θ0 + τ_M ⊙ m: sums in float32 (of float64 models in float64), rounded once to the base's dtype.

    folder: as `pack_tasks` wrote it. task: its number, from 0, or its name. save: the folder to write.

    Returns the model. Raises SettingError when there is no such task, WeightsError when the folder is not one of `pack_tasks`.
    """
    place = Path(folder)
    number = _number(place, task)
    base, change, mask = (Checkpoint(place / part) for part in ("base", "change", f"mask-{number}"))
    refuse_inputs(Path(save), [place])
    with Writer(save, metadata=base.metadata or None, overwrite=overwrite) as out:
        for name in track(base.names, str(task)):
            if name in change:
                out.add(name, onto(base.on_disk(name), _masked(change.on_disk(name), mask.on_disk(name)), 1.0))
            else:
                out.copy(name, base)
        copy_beside(out, base)
    return open(save)


def _bits(mask: Values, count: int) -> Sliced:
    """A mask of `count` entries as bytes."""

    def values(at: slice) -> Tensor:
        first, last = 8 * at.start, min(8 * at.stop, count)
        parts = [slice(start, min(start + slices.SLICE, last)) for start in range(first, last, slices.SLICE)]
        return packed(torch.cat([mask(part) for part in parts]))

    return Sliced((-(-count // 8),), torch.uint8, values)


def _masked(change: Entries, bits: Entries) -> Values:
    """The change where the bits say so, and 0 elsewhere."""
    values = flat(change)

    def kept(at: slice) -> Tensor:
        first = at.start // 8
        mask = unpacked(bits[slice(first, -(-at.stop // 8))], at.stop - 8 * first)[at.start - 8 * first :]
        return values(at) * mask

    return kept


def _number(folder: Path, task: int | str) -> int:
    """The number of a task that is named or numbered."""
    if not (folder / RECORD).is_file():
        raise WeightsError(f"{folder} has no {RECORD}: it is not a folder that `pack_tasks` wrote. Name one that is.")
    names = json.loads((folder / RECORD).read_text("utf-8"))["tasks"]
    if isinstance(task, int) and 0 <= task < len(names):
        return task
    if names.count(task) == 1:
        return names.index(task)
    how = "is the name of several tasks; give its number" if task in names else "is no task"
    raise SettingError(
        f"{folder}: {task!r} {how}.{nearest(str(task), names)} The tasks are {', '.join(names)}, from 0 to {len(names) - 1}."
    )

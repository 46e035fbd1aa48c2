"""Any safetensors checkpoint in fewer bytes, and back, bit by bit.

    import modelwright as mw

    mw.compress("model/", save="smaller/")
    mw.decompress("smaller/", save="again/")

The exponents of floats are coded as in `encode.dfloat11` (Zhang et al. 2025, arXiv:2504.11651), of norms and biases too; no module is
built, and one tensor is in memory. A tensor `name` is stored as `name_codes`, `name_bits`, `name_lengths`, `name_signs` and, but of
bfloat16, `name_rest` (see `maths.coded_floats.CodedFloats`); what would not become smaller, and what is no float, stays as it is.
`compressed.json` names the coded tensors with their dtypes and shapes, and the order of all. All other files are copied.
"""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import torch

from .core.errors import WeightsError
from .core.files import refuse_inputs
from .core.model import COMPRESSED
from .core.progress import track
from .core.weights import CODES, DTYPES, Checkpoint, Writer
from .maths.coded_floats import PARTS, SPLITS, CodedFloats, decode, encode

INDEX = "model.safetensors.index.json"


def compress(source: str | Path, save: str | Path, *, overwrite: bool = False) -> Path:
    """Write a checkpoint with its floats coded; a bfloat16 model takes about two thirds of its bytes.

    source: a folder, a .safetensors file, without what lies beside it, or a hub name. save: the folder to write.

    Returns the folder. Raises WeightsError when there is no checkpoint, or one that is compressed already, and RecipeError when `save`
    holds something, or is an input.
    """
    checkpoint = Checkpoint(source)
    if (checkpoint.path / COMPRESSED).is_file():
        raise WeightsError(f"{source} is compressed already: it has a {COMPRESSED}. Name another checkpoint.")
    alone = Path(source).is_file()
    refuse_inputs(save, [Path(source) if alone else checkpoint.path])
    coded: dict[str, Any] = {}
    with Writer(save, metadata=checkpoint.metadata, overwrite=overwrite) as out:
        for name in track(checkpoint.names, "compress"):
            parts = _coded(checkpoint, name)
            if parts is None:
                out.copy(name, checkpoint)
                continue
            coded[name] = {"dtype": CODES[checkpoint.dtype(name)], "shape": list(checkpoint.shape(name))}
            for part, values in parts._asdict().items():
                if values is not None:
                    out.add(f"{name}_{part}", values)
        if not alone:
            _copy_others(checkpoint, out)
        out.write_json(COMPRESSED, {"tensors": coded, "order": checkpoint.names})
    return Path(save)


def decompress(source: str | Path, save: str | Path, *, overwrite: bool = False) -> Path:
    """Write the checkpoint that `compress` was given: the same tensors in the same order, and the same other files.

    Returns the folder. Raises WeightsError when the source was not written by `compress`, or is damaged.
    """
    checkpoint = Checkpoint(source)
    file = checkpoint.path / COMPRESSED
    if not file.is_file():
        raise WeightsError(f"{source} has no {COMPRESSED}: it is not a folder that `compress` wrote. Name one that is.")
    refuse_inputs(save, [checkpoint.path])
    record = json.loads(file.read_text("utf-8"))
    with Writer(save, metadata=checkpoint.metadata, overwrite=overwrite) as out:
        for name in track(record["order"], "decompress"):
            if name in record["tensors"]:
                out.add(name, _decoded(checkpoint, name, **record["tensors"][name]))
            else:
                out.copy(name, checkpoint)
        _copy_others(checkpoint, out)
    return Path(save)


def _coded(checkpoint: Checkpoint, name: str) -> CodedFloats | None:
    """The parts of a tensor; None where it is to stay as it is."""
    if checkpoint.dtype(name) not in SPLITS or any(f"{name}_{part}" in checkpoint for part in PARTS):
        return None
    parts = encode(checkpoint.read(name))
    return parts if parts.nbytes < checkpoint.nbytes(name) else None


def _decoded(checkpoint: Checkpoint, name: str, dtype: str, shape: list[int]) -> torch.Tensor:
    read = [checkpoint.read(place) if (place := f"{name}_{part}") in checkpoint else None for part in PARTS]
    if any(part is None for part in read[:-1]):
        raise WeightsError(f"{checkpoint.path} lacks parts of the coded tensor {name!r}. Fetch it again.")
    try:
        return decode(CodedFloats(*read), DTYPES[dtype], math.prod(shape)).view(shape)  # type: ignore[arg-type]
    except WeightsError as error:
        raise WeightsError(f"{checkpoint.path}: {name!r}: {error}") from None


def _copy_others(checkpoint: Checkpoint, out: Writer) -> None:
    """Copy all files of a folder but its weights, and what tools keep in hidden folders."""
    weights = {checkpoint.place(name).file.resolve() for name in checkpoint.names}
    for file in sorted(checkpoint.path.rglob("*")):
        inside = file.relative_to(checkpoint.path)
        hidden = any(part.startswith(".") for part in inside.parts[:-1])
        if file.is_file() and file.resolve() not in weights and str(inside) not in (INDEX, COMPRESSED) and not hidden:
            (out.partial / inside).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, out.partial / inside)

"""Examples with labels: texts and images to classify, read, split and made into what a model takes.

Built in are sets that need no file: `topics`, passages of the text that comes with Python, labelled by the document that they are of;
`stripes`, images of waves behind noise, labelled by their angle and colours; and `turned stripes`, of the angles between.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import DataError

SIDE, ANGLES, NOISE = 16, 5, 2.0  # of stripes: pixels along an image, angles in each of two pairs of colours, deviation of the noise
PASSAGE = 240  # characters of a passage, of topics
TOPICS = 12  # the documents with the most passages


@dataclass(frozen=True)
class Labelled:
    """Texts, or images float32 [n, channels, side, side], and the number of each one's class, long [n]."""

    source: str
    labels: Tensor
    classes: int
    texts: tuple[str, ...] = field(default=(), repr=False)
    images: Tensor | None = field(default=None, repr=False)

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, places: Tensor) -> Labelled:
        """The examples at these places."""
        texts = tuple(self.texts[place] for place in places.tolist()) if self.texts else ()
        return replace(self, labels=self.labels[places], texts=texts, images=None if self.images is None else self.images[places])

    def split(self, held: float) -> tuple[Labelled, Labelled]:
        """(what is trained on, what is set aside), of each class the fraction `held`, at least one where it has two; the same each time.

        Raises:
            DataError: no class has two.
        """
        generator = torch.Generator().manual_seed(0)
        aside = torch.zeros(len(self), dtype=torch.bool)
        for number in self.labels.unique().tolist():
            places = (self.labels == number).nonzero()[:, 0]
            count = min(len(places) - 1, max(1, round(held * len(places))))
            aside[places[torch.randperm(len(places), generator=generator)[:count]]] = True
        if not aside.any():
            raise DataError(f"{self.source} has {len(self)} examples, no two of one class, and some are to be set aside. Give more.")
        return self.take((~aside).nonzero()[:, 0]), self.take(aside.nonzero()[:, 0])

    def inputs(self, tokenizer: Any, length: int) -> dict[str, Tensor]:
        """What a model takes of all examples: pixel_values, or input_ids and attention_mask [n, at most length].

        Raises:
            DataError: texts, and no tokenizer.
        """
        if self.images is not None:
            return {"pixel_values": self.images}
        if tokenizer is None:
            raise DataError(f"{self.source} holds texts, and the model has no tokenizer. Copy tokenizer.json beside its weights.")
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
        found = tokenizer(list(self.texts), truncation=True, max_length=length, padding=True, return_tensors="pt")
        return {name: found[name] for name in ("input_ids", "attention_mask")}


def read(source: str | Path) -> Labelled:
    """A set that is built in; a .jsonl file with "text" and "label" in each line; or an .npz of images x [n, side, side(, 3)] and labels y.

    Raises:
        DataError: there is no such file, or nothing readable in it.
    """
    if str(source) == "topics":
        return topics()
    if str(source) in ("stripes", "turned stripes"):
        return stripes(4000, turned=0.5 if str(source).startswith("turned") else 0.0)
    path = Path(source)
    if not path.is_file():
        raise DataError(f"There is no labelled data {str(source)!r}. Give a .jsonl or .npz file, topics, stripes, or turned stripes.")
    if path.suffix == ".npz":
        return _images(path)
    if path.suffix != ".jsonl":
        raise DataError(f"{path} is no .jsonl of texts and no .npz of images, which are the forms of labelled data.")
    texts, names = [], []
    for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{path} line {number} is not JSON: {error.msg}. Each line must be one object.") from error
        if not isinstance(row, dict) or not isinstance(row.get("text"), str) or "label" not in row:
            raise DataError(f'{path} line {number} needs the keys "text", a string, and "label".')
        texts.append(row["text"])
        names.append(row["label"])
    return _numbered(str(path), names, texts=tuple(texts))


def topics() -> Labelled:
    """Passages of the documents inside Python, each labelled by the document that it is of: those with the most passages."""
    from . import data

    documents = sorted(data.corpus().documents, key=len, reverse=True)[:TOPICS]
    texts, names = [], []
    for name, document in enumerate(documents):
        passages = [document[start : start + PASSAGE] for start in range(0, len(document) - PASSAGE, PASSAGE)]
        texts += passages[:300]
        names += [name] * len(passages[:300])
    return _numbered("topics", names, texts=tuple(texts))


def stripes(count: int, seed: int = 0, noise: float = NOISE, turned: float = 0.0) -> Labelled:
    """Waves of random length and phase behind noise [count, 3, SIDE, SIDE]; classes are the angles, and in which of two pairs of colours.

    turned: what all angles are turned by, in steps from one to the next.
    """
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 2 * ANGLES, (count,), generator=generator)
    phase, length = (torch.rand(count, 1, 1, generator=generator) for _ in range(2))
    angle = ((labels % ANGLES + turned) * math.pi / ANGLES)[:, None, None]
    rows, columns = torch.meshgrid(torch.arange(float(SIDE)), torch.arange(float(SIDE)), indexing="ij")
    wave = torch.sin((0.9 + 0.3 * length) * (columns * angle.cos() + rows * angle.sin()) + 2 * math.pi * phase)
    colour = torch.stack([torch.ones(count), (labels >= ANGLES) * 2.0 - 1, -torch.ones(count)], 1)
    images = wave[:, None] * colour[:, :, None, None] + noise * torch.randn(count, 3, SIDE, SIDE, generator=generator)
    return Labelled("stripes", labels, 2 * ANGLES, images=images)


def _images(path: Path) -> Labelled:
    import numpy as np

    try:
        found = np.load(path)
        pixels, labels = found["x"], found["y"]
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{path} should hold images x and labels y: {error}.") from error
    images = torch.from_numpy(pixels).float()
    images = images / 255 if pixels.dtype == "uint8" else images
    images = images[:, None] if images.ndim == 3 else images.movedim(-1, 1)
    images = images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images
    mean, spread = images.mean((0, 2, 3), keepdim=True), images.std((0, 2, 3), keepdim=True)
    return _numbered(str(path), labels.reshape(-1).tolist(), images=(images - mean) / spread.clamp(min=1e-6))


def _numbered(source: str, names: Sequence[Any], **examples: Any) -> Labelled:
    """Examples whose classes have any names; raises DataError where there are fewer than two classes."""
    known = sorted(set(names), key=lambda name: (str(type(name)), name))
    if len(known) < 2:
        raise DataError(f"{source} has {len(known)} classes; at least 2 are needed to tell apart.")
    return Labelled(source, torch.tensor([known.index(name) for name in names]), len(known), **examples)

"""What a step is given beside the model: text, donors, a base, a teacher, a seed."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import data as texts
from .errors import NeedError, SettingError, refuse
from .method import NEEDS, Method
from .model import Model

Batch = dict[str, Tensor]


@dataclass(kw_only=True)
class Given:
    """Everything that a method may need; what it does need is read from its verb."""

    data: texts.Text | Sequence[Batch] | None = None  # calibration and training text, or ready batches of model inputs
    donors: Sequence[Model] = ()
    base: Model | None = None
    teacher: Model | None = None
    seed: int = 0
    samples: int = 128  # calibration sequences
    length: int = 512  # tokens in each, at most what the model allows
    work: Path | None = None  # where a long step keeps its progress
    notes: list[str] = field(default_factory=list)  # what the user should know: sites left out, fallbacks
    details: list[Any] = field(default_factory=list)  # what only the record keeps: a sentence or a row of numbers for every matrix
    cache: dict[str, tuple[Any, Tensor]] = field(default_factory=dict, repr=False)  # the text's tokens, by tokenizer

    def untold(self, method: Method | type[Method]) -> bool:
        """Whether the method reads text and there is none."""
        return method.reads_text() and self.data is None and getattr(method, "texts", None) is None

    def lacking(self, method: Method | type[Method]) -> list[str]:
        """The sentences for the needs of `method` that are not given."""
        least, most = method.takes
        named = len(self.donors)
        wrong = "donors" in method.needs() and named and (named < least or most is not None and named > most)
        number = f"{least}" if most == least else f"{least} or more" if most is None else f"{least} to {most}"
        return [
            f"{method.name()} takes {number} donor{'s' * (number != '1')}; the step gives {named}. Name that many under `donors:`."
        ] * bool(wrong) + [
            f"{method.name()} needs {NEEDS[need]}."
            for need in method.needs()
            if (need in ("statistics", "calibration", "gradients", "train") and self.untold(method))
            or (need == "donors" and not self.donors)
            or (need == "teacher" and self.teacher is None)
            or (need == "base" and self.base is None)
        ]

    def refuse_lacking(self, method: Method) -> None:
        """Raise NeedError with all that is missing, SettingError where settings do not go with the number of donors."""
        refuse(NeedError, self.lacking(method))
        if "donors" in method.needs():
            refuse(SettingError, method.unfit_for(len(self.donors)))

    def models(self, *others: Model) -> list[Model]:
        """These and all models that are given."""
        return [*others, *self.donors, *(one for one in (self.base, self.teacher) if one is not None)]

    def rng(self, place: str = "") -> torch.Generator:
        """A generator that depends on the seed and the place alone, so that order and streaming do not matter."""
        digest = hashlib.sha256(f"{self.seed}/{place}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))

    def batches(self, model: Model) -> list[Batch]:
        """Calibration batches of model inputs; text becomes whole windows of tokens, spread over all of it."""
        if self.data is None or not isinstance(self.data, texts.Text):
            return list(self.data or [])
        rows = texts.windows(self.ids(model), texts.within(model.config, self.length))
        if len(rows) > self.samples:
            rows = rows[torch.linspace(0, len(rows) - 1, self.samples).round().long()]
        return [{"input_ids": part} for part in rows.split(8)]

    def calibration(self, method: Method, models: Sequence[Model]) -> list[list[Batch]]:
        """Calibration batches for each of these models: from its own text where the method names `texts`, else from the data.

        Raises:
            SettingError: another number of texts than of models.
        """
        sources = getattr(method, "texts", None)
        if sources is None:
            return [self.batches(model) for model in models]
        if len(sources) != len(models):
            raise SettingError(f"{method.name()}: {len(sources)} texts for {len(models)} donors. Give one for each donor.")
        return [replace(self, data=texts.read(source)).batches(model) for source, model in zip(sources, models, strict=True)]

    def ids(self, model: Model) -> Tensor:
        """All of the text as token ids [n]."""
        assert isinstance(self.data, texts.Text)
        if model.tokenizer is None:
            raise NeedError(f"{model.name} has no tokenizer, and text needs one. Copy tokenizer.json beside its weights.")
        config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
        backend = getattr(model.tokenizer, "backend_tokenizer", None)
        key = f"{id(self.data)} {config.vocab_size} {hash(backend.to_str()) if backend is not None else id(model.tokenizer)}"
        if key not in self.cache:
            ids = texts.tokens(self.data, model.tokenizer, needed=64, vocabulary=config.vocab_size)
            self.cache[key] = self.data, ids  # the text is kept, so that its id is not given to another
        return self.cache[key][1]


def inputs_of(module: nn.Module, batch: Batch) -> dict[str, Any]:
    """A batch on the module's device."""
    device = next((value.device for value in module.parameters() if not value.is_meta), torch.device("cpu"))
    return {key: value.to(device) for key, value in batch.items()}


def first(batches: Sequence[Batch], sequences: int) -> list[Batch]:
    """The first sequences of batches."""
    found: list[Batch] = []
    for batch in batches:
        rows = len(next(iter(batch.values())))
        found.append({name: value[:sequences] for name, value in batch.items()})
        if (sequences := sequences - rows) <= 0:
            break
    return found

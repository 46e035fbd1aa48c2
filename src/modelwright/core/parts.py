"""Small parts that train inside a model whose own weights stay as they are."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from modelwright.blocks._stored import Guest

from .errors import DataError, PlanError
from .given import Batch
from .method import Method
from .model import Model


def refuse_adapters(method: Method, model: Model) -> None:
    """Raise PlanError for a model that bears an adapter: what is saved of it is the adapter alone."""
    if "adapters" in model.marks:
        raise PlanError(f"{method.name()}: {model.name} bears an adapter, which is saved alone. Fold it first, with adapt.fold.")


def row_of(batches: Sequence[Batch], name: str) -> tuple[Tensor, int]:
    """The tokens of batches that are no padding as one row [n], and the length of a sequence of them.

    Raises DataError where there are fewer than two tokens in a row.
    """
    if not batches or "input_ids" not in batches[0]:
        raise DataError(f"{name} learns from tokens, and the calibration data has none. Give text.")
    rows = [batch["input_ids"][batch["attention_mask"].bool()] if "attention_mask" in batch else batch["input_ids"].flatten()
            for batch in batches]  # fmt: skip
    ids = torch.cat(rows)
    length = min(max(batch["input_ids"].shape[1] for batch in batches), len(ids))
    if length < 2:
        raise DataError(f"{name} learns from tokens that follow others; {len(ids)} were given. Give more text.")
    return ids, length


@contextlib.contextmanager
def leaving_on_error(guests: Sequence[Guest]) -> Iterator[None]:
    """Where the work inside is broken off these leave their hosts, which are then what they were before."""
    try:
        yield
    except BaseException:
        for guest in guests:
            guest.leave()
        raise


@contextlib.contextmanager
def alone(module: nn.Module, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Only these parameters of a module require a gradient inside, and none of them afterwards does what it did not before."""
    before = [(value, value.requires_grad) for value in module.parameters()]
    try:
        for value, _ in before:
            value.requires_grad_(False)
        for value in parameters:
            value.requires_grad_(True)
        yield
    finally:
        for value, kept in before:
            value.requires_grad_(kept)

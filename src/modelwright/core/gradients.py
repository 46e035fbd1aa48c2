"""Losses of whole models on calibration batches, and their gradients: of a loss, and squared example by example."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Container, Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from modelwright.anatomy import Site

from .errors import DataError, LayoutError, ModelError
from .given import Batch
from .model import Model, unwrapped
from .passage import Resident
from .progress import track

Targets = Literal["predicted", "sampled", "exact", "text"]


def squared_gradients(model: Model, batches: Sequence[Batch], targets: Targets, rng: torch.Generator) -> dict[str, Tensor]:
    """The diagonal of the Fisher information, mean over examples of (∂ log q(y|x)/∂θ)², float32, by parameter.

    An example is a row of a batch, and predicts one thing: a class, or the token after its last one that is no padding.
    targets: which y counts: the most likely ("predicted"), one drawn from q ("sampled"), all of them weighted by q
    ("exact", with as many backward passes as there are classes), or the row's own last token ("text").

    Weights stay as they are. Raises DataError when no row gives an example.
    """
    walk = Resident(model)
    sums = {name: torch.zeros_like(value, dtype=torch.float32) for name, value in floats(walk.module).items()}
    count = 0
    with trainable(walk.module) as parameters:
        for row in track(list(_rows(batches)), "gradients"):
            place = _last(row, targets == "text")
            if place is None:
                continue
            logits = logits_of(walk.forward(row))
            log = (logits[0, _within(place, logits)] if logits.ndim == 3 else logits[0]).float().log_softmax(-1)
            labels = _labels(log, row, place, targets, rng)
            for number, (label, share) in enumerate(labels):
                found = torch.autograd.grad(log[label], list(parameters.values()), retain_graph=number + 1 < len(labels), allow_unused=True)
                for total, gradient in zip(sums.values(), found, strict=True):
                    if gradient is not None:
                        total.addcmul_(gradient.float(), gradient.float(), value=share)
            count += 1
    if not count:
        raise DataError(f"{model.name} was given no example to take gradients of. Give it text of two tokens or more.")
    return {name: total.div_(count) for name, total in sums.items()}


@torch.no_grad()
def text_loss(model: Model, batches: Sequence[Batch]) -> float:
    """The mean negative log-likelihood in nats of each token that follows another; e to it is the perplexity.

    Raises:
        DataError: no batch has two tokens in a row.
    """
    walk, total, count = Resident(model), 0.0, 0
    for batch in batches:
        logits = logits_of(walk.forward(batch))
        targets = next_tokens(batch, logits.device).flatten()
        total += float(F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), targets, reduction="sum"))
        count += int((targets >= 0).sum())
    if not count:
        raise DataError(f"{model.name} was given no token that follows another. Give it text of two tokens or more.")
    return total / count


def finite_loss(model: Model, batches: Sequence[Batch], name: str) -> float:
    """The `text_loss` of a model on which the method of this name is to work.

    Raises:
        ModelError: it is NaN or infinite.
        DataError: no batch has two tokens in a row.
    """
    loss = text_loss(model, batches)
    if not math.isfinite(loss):
        raise ModelError(f"{name}: the loss of {model.name} on the text is {loss}. Look for NaN in it, or use a wider dtype or other text.")
    return loss


def next_tokens(batch: Batch, device: torch.device) -> Tensor:
    """The token after each but the last [rows, places - 1]; -100, which no loss counts, where it is padding."""
    if "input_ids" not in batch:
        raise LayoutError(
            f"the next tokens of a text are asked for, and the data holds {', '.join(batch)}: such a model predicts no tokens"
        )
    ids = batch.get("decoder_input_ids", batch["input_ids"]).to(device)
    mask = batch.get("attention_mask")
    real = mask.to(ids.device) if mask is not None and mask.shape == ids.shape else torch.ones_like(ids)
    return ids[:, 1:].masked_fill(real[:, 1:] == 0, -100)


def mean_gradients(
    model: Model, batches: Sequence[Batch], labels: Sequence[Tensor] | None = None, names: Container[str] | None = None
) -> dict[str, Tensor]:
    """∂L/∂θ in float32, by parameter, of the mean over batches of the cross-entropy: of next tokens, or with the `labels`.

    A batch may have the key "labels" itself, the class of each row, which the model is not given. names: of the parameters that are
    asked for; by default all.
    """
    walk = Resident(model)
    asked = {name: value for name, value in floats(walk.module).items() if names is None or name in names}
    sums = {name: torch.zeros_like(value, dtype=torch.float32) for name, value in asked.items()}
    with trainable(walk.module):
        for number, batch in enumerate(batches):
            own = batch["labels"] if "labels" in batch and "input_ids" not in batch else labels[number] if labels is not None else None
            logits = logits_of(walk.forward({key: value for key, value in batch.items() if key != "labels" or own is None}))
            if own is not None:
                loss = F.cross_entropy(logits.flatten(0, -2).float(), own.flatten().to(logits.device))
            else:
                loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), next_tokens(batch, logits.device).flatten())
            for total, gradient in zip(sums.values(), torch.autograd.grad(loss, list(asked.values()), allow_unused=True), strict=True):
                if gradient is not None:
                    total.add_(gradient, alpha=1 / len(batches))
    return sums


def row_gradients(model: Model, batches: Sequence[Batch]) -> Iterator[tuple[float, dict[str, Tensor]]]:
    """(1 / n, ∂L/∂θ in float32 by parameter) for each of the n rows of the batches; L is the loss of `mean_gradients`.

    Raises DataError when there is no row.
    """
    rows = list(_rows(batches))
    if not rows:
        raise DataError(f"{model.name} was given no example to take gradients of. Give it text of two tokens or more.")
    for row in track(rows, "gradients"):
        yield 1 / len(rows), mean_gradients(model, [row])


def gradient_moments(model: Model, batches: Sequence[Batch]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The means over `row_gradients` and over their squares, float32, by parameter."""
    sums: dict[str, Tensor] = {}
    squares: dict[str, Tensor] = {}
    for share, gradients in row_gradients(model, batches):
        for name, found in gradients.items():
            sums.setdefault(name, torch.zeros_like(found)).add_(found, alpha=share)
            squares.setdefault(name, torch.zeros_like(found)).addcmul_(found, found, value=share)
    return sums, squares


def input_fisher(model: Model, sites: Sequence[Site], batches: Sequence[Batch]) -> list[Tensor]:
    """For each site the root of the mean over `row_gradients` and outputs of (∂L/∂W)², [in] float32."""
    squares: list[Any] = [0.0] * len(sites)
    for share, gradients in row_gradients(model, batches):
        for place, site in enumerate(sites):
            squares[place] += share * gradients[site.name].square().mean(1 if site.transposed else 0)
    return [each.sqrt() for each in squares]


def floats(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that are real numbers, tied ones once."""
    return {name: value for name, value in module.named_parameters() if value.is_floating_point()}


@contextlib.contextmanager
def trainable(module: nn.Module) -> Iterator[dict[str, nn.Parameter]]:
    """The float parameters, through which gradients flow inside; nothing of the module changes."""
    parameters = floats(unwrapped(module))
    before = [value.requires_grad for value in parameters.values()]
    try:
        for value in parameters.values():
            value.requires_grad_(True)
        with torch.enable_grad():
            yield parameters
    finally:
        for value, kept in zip(parameters.values(), before, strict=True):
            value.requires_grad_(kept)


def logits_of(found: Any) -> Tensor:
    """What a model predicts, [rows, classes] or [rows, places, classes].

    Raises:
        ModelError: it returns no logits.
    """
    if isinstance(found, Tensor):
        return found
    for name in ("logits", "logits_per_image"):
        if getattr(found, name, None) is not None:
            return getattr(found, name)
    raise ModelError(f"The model returns a {type(found).__name__} without logits, so nothing says what it predicts. Give one with a head.")


def _rows(batches: Sequence[Batch]) -> Iterator[Batch]:
    for batch in batches:
        for row in range(len(next(iter(batch.values())))):
            yield {key: value[row : row + 1] for key, value in batch.items()}


def _last(row: Batch, own: bool) -> int | None:
    """The place whose prediction counts: of the last token, or, where the row's `own` token is asked for, of the one before."""
    ids = row.get("input_ids")
    if ids is None:
        if own:
            raise DataError("targets: text needs rows of tokens, and these have none. Choose predicted, sampled or exact.")
        return -1
    mask = row.get("attention_mask", torch.ones_like(ids))[0]
    places = mask.nonzero()[:, 0].tolist()
    return None if len(places) < 1 + own else places[-1 - own]


def _within(place: int, logits: Tensor) -> int:
    """The place among those of the logits, which a decoder of its own has fewer of."""
    return place if place < logits.shape[1] else -1


def _labels(log: Tensor, row: Batch, place: int, targets: Targets, rng: torch.Generator) -> list[tuple[int, float]]:
    """The classes that count and their weights."""
    if targets == "predicted":
        return [(int(log.argmax()), 1.0)]
    if targets == "sampled":
        return [(int(torch.multinomial(log.detach().exp().cpu(), 1, generator=rng)), 1.0)]
    if targets == "exact":
        return list(enumerate(log.detach().exp().tolist()))
    return [(int(row["input_ids"][0, place + 1]), 1.0)]

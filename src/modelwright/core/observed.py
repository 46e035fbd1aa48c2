"""What enters modules while calibration text runs through a model."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .given import Batch
from .model import Model
from .passage import Resident, real


@torch.no_grad()
def inputs_of_modules(model: Model, paths: Sequence[str], batches: Sequence[Batch], tokens: int) -> dict[str, Tensor]:
    """By path, what enters modules at as many tokens, spread evenly over all that are no padding [tokens, width]."""
    walk, turn = Resident(model), dict[str, Any]()
    found: dict[str, list[Tensor]] = {path: [] for path in paths}

    def hook(path: str) -> Callable[..., None]:
        def keep(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            found[path].append(real(args[0], turn["mask"])[turn["places"].to(args[0].device)])

        return keep

    with contextlib.ExitStack() as hooks:
        for path in paths:
            hooks.callback(walk.module.get_submodule(path).register_forward_pre_hook(hook(path)).remove)
        for batch, places in _spread(batches, tokens):
            turn |= {"mask": batch.get("attention_mask"), "places": places}
            walk.forward(batch)
    return {path: torch.cat(parts) for path, parts in found.items()}


def _spread(batches: Sequence[Batch], tokens: int) -> Iterator[tuple[Batch, Tensor]]:
    """Each batch with the places of the chosen ones among its real tokens."""
    counts = [int(batch["attention_mask"].sum()) if "attention_mask" in batch else batch["input_ids"].numel() for batch in batches]
    places, before = torch.linspace(0, sum(counts) - 1, min(tokens, sum(counts)), dtype=torch.float64).round().long(), 0
    for batch, number in zip(batches, counts, strict=True):
        yield batch, places[(places >= before) & (places < before + number)] - before
        before += number

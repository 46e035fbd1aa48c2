"""What searches of a merge's coefficients share: the loss that they lower, and the search itself."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from modelwright.core.errors import SiteError
from modelwright.core.measure import window_losses
from modelwright.core.progress import bar


@torch.no_grad()
def nats(module: nn.Module, batches: Sequence[Mapping[str, Tensor]]) -> float:
    """Mean negative log-likelihood of the next token, in nats; pad tokens, where `attention_mask` is 0, are cut out.

    Raises:
        SiteError: there is no token to predict.
    """
    rows = [row for batch in batches if "input_ids" in batch for row in _unpadded(batch)]
    losses = [window_losses(module, row, len(row)) for row in rows if len(row) > 1]
    total = sum(int(count.sum()) for _, count in losses)
    if not total:
        raise SiteError("A search of coefficients needs calibration text of two tokens or more. Add `data:`.")
    return float(sum(loss.sum() for loss, _ in losses)) / total


def _unpadded(batch: Mapping[str, Tensor]) -> list[Tensor]:
    """The tokens of each row that are no padding."""
    ids = batch["input_ids"]
    kept = batch.get("attention_mask", torch.ones_like(ids)).bool()
    return [row[mask] for row, mask in zip(ids, kept, strict=True)]


def search(
    objective: Callable[[Any], float],
    ranges: Mapping[str, tuple[float, float]],
    first: Mapping[str, float],
    sampler: str,
    trials: int,
    points: int,
    seed: int,
    name: str,
) -> Any:
    """Optuna's study of `trials` trials for the least objective, the first with the coefficients `first`.

    sampler: "cmaes", "tpe", or "grid" with so many points for each coefficient, without the first.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        grid = {gene: torch.linspace(low, high, points, dtype=torch.float64).tolist() for gene, (low, high) in ranges.items()}
        made = {
            "cmaes": lambda: optuna.samplers.CmaEsSampler(seed=seed),
            "tpe": lambda: optuna.samplers.TPESampler(seed=seed),
            "grid": lambda: optuna.samplers.GridSampler(grid, seed=seed),
        }
        study = optuna.create_study(sampler=made[sampler]())
    if sampler != "grid":
        study.enqueue_trial(dict(first))
    with bar(name, trials) as tick:
        study.optimize(objective, trials, callbacks=[lambda study, _: tick(note=f"{study.best_value:.4f} nats")])
    return study

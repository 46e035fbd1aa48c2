"""How a quantity goes over a run: functions of the run's progress, 0 to 1."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

POINTS = 4096  # between which compute is taken to grow on straight lines


def cubic(progress: float, first: float, last: float) -> float:
    """From `first` to `last`, steep at the start and level at the end: last + (first - last) · (1 - progress)³.

    Zhu, Gupta 2017, arXiv:1710.01878, equation 1. Before 0 it is `first`, after 1 `last`.
    """
    return last + (first - last) * (1 - min(max(progress, 0.0), 1.0)) ** 3


def along(point: float, begin: float, end: float) -> float:
    """How far `point` lies from `begin` to `end`: 0 and 1 there; 1 where they are the same."""
    return (point - begin) / (end - begin) if end > begin else 1.0


def times_within(spent: Sequence[float], begin: float, end: float, every: int) -> list[int]:
    """The steps from `begin` to `end` that lie `every` steps apart from the first on, and the one at `end`, which is the last.

    spent: the share of the run, rising from 0, that is spent when each of its steps begins. A run that never comes to `end`
    has its last step there.
    """
    steps = len(spent)
    first = next((step for step, point in enumerate(spent) if point >= begin - 1e-9), steps)
    last = next((step for step, point in enumerate(spent) if point >= end - 1e-9), steps - 1)
    return [*range(first, last, every), max(last, min(first, steps - 1))]


def geometric(first: float, last: float, progress: float) -> float:
    """From `first` to `last`, both above 0, by equal factors: first · (last / first)^progress."""
    return first * (last / first) ** progress


def compute_at_steps(steps: int, cost: Callable[[float], float]) -> list[float]:
    """The share of a run's compute that is spent when each of its steps begins, where a step costs what `cost` says there.

    cost: of a step, by the share of the compute that is spent before it; any unit, above 0.
    """
    spent = np.linspace(0, 1, POINTS + 1)
    per_compute = 1 / np.array([cost(float(share)) for share in spent])  # steps that a unit of compute is enough for
    taken = np.concatenate([[0.0], np.cumsum((per_compute[1:] + per_compute[:-1]) / 2)])
    return np.interp(np.arange(steps) / steps, taken / taken[-1], spent).tolist()

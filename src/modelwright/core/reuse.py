"""Let parts of a network give again, at some steps of a sampler, what they gave at the last step at which they computed.

Feature inheritance of Zhu et al. 2024 (A-SDM, arXiv:2406.00210), and caching as in DeepCache (arXiv:2312.00858): a diffusion model is
called again and again with inputs that change little. It works for any module, blocks of a U-Net or of a diffusion
transformer alike.
Differs: the papers' code was not at hand; which parts and which steps is left to the caller, beside two plain schedules.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from .errors import ModelError, SettingError

Schedule = Callable[[int], bool]  # the number of a step, from 0 -> whether parts compute in it


def every(period: int) -> Schedule:
    """Compute at each `period`-th step, from the first on; 1: always."""
    if period < 1:
        raise SettingError(f"A period of {period} was asked for; it is 1 or more.")
    return lambda step: step % period == 0


def dense_ends(steps: int, period: int, ends: int) -> Schedule:
    """Compute at the first and last `ends` of so many steps, and at each `period`-th between."""
    between = every(period)
    return lambda step: step < ends or step >= steps - ends or between(step - ends)


class FeatureCache:
    """Inside, a module computes at the steps that a schedule says, and at others gives what it gave last.

    module: one or several. clock: the module whose calls are the steps, such as the whole network; by default each module's own calls
    are. `computed` and `reused` count calls. Nothing of the modules' weights changes, and `close` (or the end of a `with`)
    leaves them as they were.

    Raises ModelError, when a part is asked for what it gave, if its inputs now have other shapes.
    """

    def __init__(self, module: nn.Module | Sequence[nn.Module], schedule: Schedule, clock: nn.Module | None = None):
        self.schedule, self.computed, self.reused = schedule, 0, 0
        self.parts = [module] if isinstance(module, nn.Module) else list(module)
        self._steps, self._held = [0] * len(self.parts), [None] * len(self.parts)  # type: list[int], list[Any]
        for part in self.parts:
            if "forward" in vars(part):
                raise ModelError(f"A {type(part).__name__} has another forward already, such as that of a cache. Close that first.")
        for place, part in enumerate(self.parts):
            vars(part)["forward"] = self._around(place, part, clock is None)
        self._clock = clock.register_forward_hook(self._tick) if clock is not None else None

    def _tick(self, *_: Any) -> None:
        self._steps = [step + 1 for step in self._steps]

    def _around(self, place: int, part: nn.Module, own: bool) -> Callable[..., Any]:
        inner = part.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            step = self._steps[place]
            self._steps[place] += own
            shapes = [value.shape for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
            if self._held[place] is None or self.schedule(step):
                self.computed += 1
                self._held[place] = (shapes, inner(*args, **kwargs))
            elif self._held[place][0] != shapes:
                now, then = (", ".join(str(list(shape)) for shape in each) for each in (shapes, self._held[place][0]))
                raise ModelError(
                    f"A {type(part).__name__} is given {now} at step {step}, and kept what it gave for {then}. Call reset first."
                )
            else:
                self.reused += 1
            return self._held[place][1]

        return forward

    def reset(self) -> None:
        """Begin a new run of the sampler: the next step is the first."""
        self._steps, self._held = [0] * len(self.parts), [None] * len(self.parts)

    def close(self) -> None:
        """Let the modules compute by themselves again; a second time does nothing."""
        for part in self.parts:
            vars(part).pop("forward", None)
        self.parts = []
        if self._clock is not None:
            self._clock.remove()
        self.reset()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def switched(steps: int, small: int) -> Callable[[int], int]:
    """Which of two networks serves a step: 1, the small one, for the `small` steps in the middle, else 0."""
    first = (steps - small) // 2
    return lambda step: int(first <= step < first + small)


def tensors_of(found: Any) -> list[Tensor]:
    """The tensors in what a module gives: one, or those of a tuple, a list, a mapping or an output object."""
    if isinstance(found, Tensor):
        return [found]
    values = found.values() if hasattr(found, "values") else found if isinstance(found, (tuple, list)) else ()
    return [tensor for value in values for tensor in tensors_of(value)]


def distance(found: Any, wanted: Any) -> Tensor:
    """The mean squared difference of what two modules give, summed over their tensors."""
    pairs = list(zip(tensors_of(found), tensors_of(wanted), strict=True))
    wrong = [(list(one.shape), list(two.shape)) for one, two in pairs if one.shape != two.shape]
    if wrong or not pairs:
        raise ModelError(f"Parts can be compared that give tensors of the same shapes; found {wrong[0] if wrong else 'no tensor'}.")
    return torch.stack([(one.float() - two.float()).square().mean() for one, two in pairs]).sum()

"""Make a network smaller piece by piece: find the parts that matter least, take them out, teach each piece alone, then all together.

The tuning path of A-SDM, Zhu et al. 2024, arXiv:2406.00210, and 2023, arXiv:2312.15516, for diffusion U-Nets; any network of blocks
goes. A batch is a mapping of the network's inputs by name; under "target" it may have what the whole should give, such as the
noise.
Differs: the papers' code was not at hand. Their term on features that a text conditions, and their attention for redundant
inputs, are left out.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from modelwright.blocks.passing import Passing

from .errors import DataError, ModelError, SettingError
from .reuse import distance, tensors_of

Batch = Mapping[str, Any]


def sensitivity(net: nn.Module, parts: Sequence[str], batches: Sequence[Batch]) -> dict[str, float]:
    """For each part by its path: the mean squared change of the network's output without it; the least can go first.

    The network stays as it is. Raises ModelError for a part that nothing can stand for, by `Passing.of`.
    """
    _refuse_empty(batches)
    with torch.no_grad():
        wanted = [_called(net, batch) for batch in batches]
        found = {}
        for path in parts:
            with _without(net, path, batches[0]):
                changes = [distance(_called(net, batch), before) for batch, before in zip(batches, wanted, strict=True)]
            found[path] = float(torch.stack(changes).mean())
    return found


def remove_parts(net: nn.Module, parts: Sequence[str], batch: Batch) -> None:
    """Take parts out in place; their ways around stay, so that whatever reads their outputs, skips too, finds the same channels.

    Raises ModelError, before anything changes, for a part that nothing can stand for.
    """
    with torch.no_grad():
        stands = {path: _stand(net, path, batch) for path in parts}
    for path, stand in stands.items():
        net.set_submodule(path, stand)


def incubate(
    teacher: nn.Module, student: nn.Module, parts: Sequence[str], batches: Sequence[Batch], *, steps: int = 100, learning_rate: float = 1e-3
) -> dict[str, tuple[float, float]]:
    """Teach each part of the student alone to give what the teacher's part of that path gives, for what reaches it in the teacher.

    Of the student only these parts change. Returns the mean squared error of each, before and after.
    Raises ModelError where a part gives other shapes, or the teacher never calls it.
    """
    _refuse_empty(batches)
    found = {}
    for path in parts:
        piece = student.get_submodule(path)
        with torch.no_grad():
            calls = [call for batch in batches for call in _calls(teacher, path, batch)]
            before = float(torch.stack([distance(piece(*args, **kwargs), made) for args, kwargs, made in calls]).mean())
        for step in _steps(piece, steps, learning_rate):
            args, kwargs, made = calls[step % len(calls)]
            distance(piece(*args, **kwargs), made).backward()
        with torch.no_grad():
            found[path] = before, float(torch.stack([distance(piece(*args, **kwargs), made) for args, kwargs, made in calls]).mean())
    return found


def assemble(
    teacher: nn.Module, student: nn.Module, stages: Sequence[str], batches: Sequence[Batch], *, steps: int = 100,
    learning_rate: float = 1e-4, target: float = 1.0, output: float = 1.0, features: float = 1.0,
) -> list[float]:  # fmt: skip
    """Teach all of the student: target · ‖s - target‖² + output · ‖s - t‖² + features · Σ over stages ‖f_s - f_t‖², all means.

    stages: paths that both networks have. A batch without "target" has no first term. Returns the loss of each step.
    """
    _refuse_empty(batches)
    losses: list[float] = []
    with _recorded(teacher, stages) as wanted, _recorded(student, stages) as seen:
        for step in _steps(student, steps, learning_rate):
            batch = batches[step % len(batches)]
            with torch.no_grad():
                made = tensors_of(_called(teacher, batch))[0]
            own = tensors_of(_called(student, batch))[0]
            loss = output * distance(own, made) + features * sum(distance(seen[path], wanted[path]) for path in stages)
            if "target" in batch:
                loss = loss + target * distance(own, batch["target"])
            loss.backward()
            losses.append(float(loss.detach()))
    return losses


def _called(net: nn.Module, batch: Batch) -> Any:
    return net(**{name: value for name, value in batch.items() if name != "target"})


def _refuse_empty(batches: Sequence[Batch]) -> None:
    if not batches:
        raise DataError("No batch was given. Give at least one, a mapping of the network's inputs.")


def _steps(module: nn.Module, steps: int, learning_rate: float) -> Iterator[int]:
    """The numbers of steps, before each of which gradients are cleared and after which the module's parameters move."""
    if steps < 0:
        raise SettingError(f"{steps} steps were asked for; it is 0 or more.")
    parameters = [value for value in module.parameters() if value.requires_grad]
    optimizer = torch.optim.Adam(parameters, learning_rate) if parameters else None
    for step in range(steps if optimizer else 0):
        assert optimizer is not None
        optimizer.zero_grad()
        yield step
        optimizer.step()
    for value in parameters:
        value.grad = None


def _calls(net: nn.Module, path: str, batch: Batch) -> list[tuple[tuple[Any, ...], dict[str, Any], Any]]:
    """What a part of a network was given, by place and by name, and gave, for each time that it was called."""
    calls: list[tuple[tuple[Any, ...], dict[str, Any], Any]] = []
    handle = net.get_submodule(path).register_forward_hook(
        lambda _, args, kwargs, made: calls.append((args, kwargs, made)), with_kwargs=True
    )
    try:
        _called(net, batch)
    finally:
        handle.remove()
    if not calls:
        raise ModelError(f"{path} was never called, so nothing says what it does. Name parts that the network runs.")
    return calls


@contextlib.contextmanager
def _recorded(net: nn.Module, paths: Sequence[str]) -> Iterator[dict[str, Any]]:
    """What parts gave last, by their paths."""
    made: dict[str, Any] = {}
    handles = [
        net.get_submodule(path).register_forward_hook(lambda _, __, found, path=path: made.__setitem__(path, found)) for path in paths
    ]
    try:
        yield made
    finally:
        for handle in handles:
            handle.remove()


def _stand(net: nn.Module, path: str, batch: Batch) -> Passing:
    args, kwargs, made = _calls(net, path, batch)[0]
    given = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), torch.empty(0))
    return Passing.of(net.get_submodule(path), given, made)


@contextlib.contextmanager
def _without(net: nn.Module, path: str, batch: Batch) -> Iterator[None]:
    before = net.get_submodule(path)
    net.set_submodule(path, _stand(net, path, batch))
    try:
        yield
    finally:
        net.set_submodule(path, before)

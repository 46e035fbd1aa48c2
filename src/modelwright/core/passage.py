"""Carry text through a model block by block: what enters each block, and the statistics of its matrices' inputs.

`Resident` does so for a model in memory; `core.stream` reads each block from disk when its turn comes.
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from modelwright.anatomy import Site, anatomy_of

from . import loading, sharing
from .errors import ModelError
from .given import Batch, inputs_of
from .model import Model, unwrapped, weight_of
from .statistics import Statistics
from .weights import Checkpoint, Writer


class _Stub(nn.Module):
    """Stands for a block: hands its input on, remembers how it was called, answers for the block's attributes."""

    def __init__(self, block: nn.Module, calls: list[Any], in_tuple: bool, play: Iterator[Tensor] | None = None):
        super().__init__()
        self._original = [block]  # in a list, so that it is no submodule
        self._calls, self._in_tuple, self._play = calls, in_tuple, play

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_original"][0], name)

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        self._calls.append((args, kwargs))
        out = next(self._play) if self._play is not None else hidden
        return (out,) if self._in_tuple else out


class _Entered(Exception):
    """The blocks were reached."""


class _Gathered(Exception):
    """A batch has reached every matrix whose inputs are gathered."""


class Resident:
    """A model in memory, walked block by block with the activations that enter each block carried on."""

    def __init__(self, model: Model, work: Path | None = None):
        self.model = model
        self.module = unwrapped(model.module)
        self.work = None if sharing.shared(self.module) else work  # blocks that share weights cannot be kept one by one
        self.anatomy = anatomy_of(self.module)
        self.path = self.anatomy.blocks(self.module)
        self.depths = len(self.stack) if self.path else 0

    @property
    def stack(self) -> nn.ModuleList:
        assert self.path is not None
        return cast(nn.ModuleList, self.module.get_submodule(self.path))

    @contextlib.contextmanager
    def standing(self, others: Mapping[int, nn.Module]) -> Iterator[None]:
        """Other blocks in the place of those at these depths."""
        own = {depth: self.stack[depth] for depth in others}
        for depth, block in others.items():
            self.stack[depth] = block
        try:
            yield
        finally:
            for depth, block in own.items():
                self.stack[depth] = block

    # What the streaming walk does otherwise.

    def load_outside(self, *, head: bool = True) -> None:
        """Have the tensors outside the blocks ready, with or without the head."""

    def free_outside(self) -> None:
        """They are not needed until further notice."""

    def load(self, depth: int) -> None:
        """Have a block's tensors ready."""

    def finish(self, depth: int) -> None:
        """The block is done with."""

    # Resume: with a work folder, every finished block is kept there.

    def keep(self, depth: int, notes: Sequence[str] = ()) -> None:
        """Store a finished block in the work folder, with the notes that were made of it."""
        if self.work is None:
            return
        block = self.stack[depth]
        prefix = f"{self.path}.{depth}."
        with Writer(self.work / f"block-{depth:05d}", overwrite=True) as out:
            for name, value in block.state_dict().items():
                out.add(prefix + name, value)
            out.write_json("layers.json", {prefix + name: text for name, text in loading.described(block).items()})
            out.write_json("notes.json", {"notes": list(notes)})

    def restore(self, depth: int, notes: list[str]) -> bool:
        """Put a block that was finished before back in place, and add its notes; say whether there was one."""
        if self.work is None or not (self.work / f"block-{depth:05d}").is_dir():
            return False
        kept = Checkpoint(self.work / f"block-{depth:05d}")
        loading.install(self.module, json.loads((kept.path / "layers.json").read_text("utf-8")))
        fill(self.module, kept.names, kept.read)
        notes += json.loads((kept.path / "notes.json").read_text("utf-8"))["notes"]
        return True

    def enter(self, batches: Sequence[Batch]) -> None:
        """Run the batches up to the first block; keep what enters it and how every block is called."""
        self.load_outside(head=False)
        self.masks = [batch.get("attention_mask") for batch in batches]
        originals = list(self.stack)
        caught: list[Any] = []

        def catch(_: nn.Module, args: Any, kwargs: Any) -> None:
            caught.append((args, kwargs))
            raise _Entered

        self.load(0)
        handle = originals[0].register_forward_pre_hook(catch, with_kwargs=True)
        with contextlib.suppress(_Entered):
            self.forward(batches[0])
        handle.remove()
        if not caught:
            raise ModelError(f"{self.model.name}: the calibration inputs never reach its first block.")
        args, kwargs = caught[0]
        in_tuple = isinstance(originals[0](*args, **kwargs), tuple)
        calls: list[list[Any]] = [[] for _ in originals]
        states: list[Tensor] = []
        self._in_tuple = in_tuple

        class Recorder(_Stub):
            def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
                if self._calls is calls[0]:
                    states.append(hidden)
                out = super().forward(hidden, *args, **kwargs)
                if self._calls is calls[-1]:
                    raise _Entered  # what follows the last block is not needed
                return out

        with self.standing({depth: Recorder(block, calls[depth], in_tuple) for depth, block in enumerate(originals)}):
            for batch in batches:
                with contextlib.suppress(_Entered):
                    self.forward(batch)
        self.states, self.calls = states, calls
        self.free_outside()

    def forward(self, batch: Batch) -> Any:
        """The whole module on one batch, without a cache."""
        config: Any = getattr(self.module, "config", None)
        cached = getattr(config, "use_cache", None)
        if cached:
            config.use_cache = False
        try:
            return self.module(**inputs_of(self.module, batch))
        finally:
            if cached:
                config.use_cache = True

    def run_block(self, depth: int) -> Iterator[Tensor]:
        """What leaves a block, batch by batch."""
        block = self.stack[depth]
        for state, (args, kwargs) in zip(self.states, self.calls[depth], strict=True):
            try:
                out = block(state, *args, **kwargs)
            except _Gathered:
                out = state  # nobody asks for what leaves the block
            yield out[0] if isinstance(out, tuple) else out

    def tail(self, batches: Sequence[Batch]) -> None:
        """Run what follows the last block, on the carried activations."""
        self.load_outside()
        plays = {self.depths - 1: iter(self.states)}
        stubs = {depth: _Stub(block, [], self._in_tuple, plays.get(depth)) for depth, block in enumerate(self.stack)}
        with self.standing(stubs):
            for batch in batches:
                self.forward(batch)
        self.free_outside()


def real(state: Tensor, mask: Tensor | None) -> Tensor:
    """Activations [tokens, width] without the padded ones."""
    return state[mask.bool()] if mask is not None and mask.shape == state.shape[:2] else state.flatten(0, -2)


def last_real(state: Tensor, mask: Tensor | None) -> Tensor:
    """Activations [rows, width] of the last token of each row that is no padding."""
    if mask is None or mask.shape != state.shape[:2]:
        return state[:, -1]
    places = (mask.long() * torch.arange(1, mask.shape[1] + 1, device=mask.device)).argmax(1)
    return state[torch.arange(len(state), device=state.device), places.to(state.device)]


def fill(module: nn.Module, names: Iterable[str], read: Callable[[str], Tensor]) -> None:
    """Give the named parameters and buffers of a module the tensors that `read` returns, whatever was there."""
    for name in names:
        path, _, leaf = name.rpartition(".")
        owner = module.get_submodule(path)
        tensor = read(name)
        if leaf in owner._parameters:
            owner._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
        else:
            owner._buffers[leaf] = tensor


def gather(
    walk: Resident, sites: Sequence[Site], gathers: Sequence[str], run: Callable[[], Any], *, stop: bool = False
) -> dict[str, Statistics]:
    """The statistics of the inputs of these matrices while `run` runs; pad tokens do not count.

    With `stop`, a batch ends when it has reached all of them, if the first batch has reached each exactly once.
    """
    found: dict[str, Statistics] = {}
    handles = []
    turn: dict[str, Any] = {"batch": 0, "input": None, "reached": [], "all": 0}
    for site in sites:
        layer = walk.module.get_submodule(site.module)
        weight = weight_of(walk.module, site)
        assert weight is not None
        collector = found[site.name] = Statistics(weight[0].numel(), gathers, weight.device)
        collector.sharers = 1
        if isinstance(layer, nn.Conv2d):
            handles.append(layer.register_forward_pre_hook(_convolution_hook(collector)))
        else:
            handles.append(layer.register_forward_pre_hook(_linear_hook(site.name, found, walk, turn)))
    try:
        for number, _ in enumerate(run(), 1):
            if stop and number == 1 and sorted(turn["reached"]) == sorted(found):
                turn["all"] = len(found)
            turn |= {"batch": number, "reached": []}
    finally:
        for handle in handles:
            handle.remove()
    return found


def statistics_of(model: Model, sites: Sequence[Site], gathers: Sequence[str], batches: Sequence[Batch]) -> dict[str, Statistics]:
    """The same, by the names of matrices anywhere in a model in memory, which runs as a whole."""
    walk = Resident(model)
    walk.masks = [batch.get("attention_mask") for batch in batches]
    with torch.no_grad():
        return gather(walk, sites, gathers, functools.partial(map, walk.forward, batches))


class Similarities:
    """For each block, the mean over tokens of the cosine of what enters and what leaves it, of all that runs until `remove`."""

    def __init__(self, blocks: Sequence[nn.Module]):
        self._sums, self._tokens = torch.zeros(2, len(blocks), dtype=torch.float64)
        self.mask: Tensor | None = None  # of the batch that runs, whose pad tokens do not count
        self._handles = [block.register_forward_hook(self._counter(depth), with_kwargs=True) for depth, block in enumerate(blocks)]

    def _counter(self, depth: int) -> Callable[..., None]:
        @torch.no_grad()
        def count(_: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
            before, after = args[0] if args else kwargs["hidden_states"], out[0] if isinstance(out, tuple) else out
            cosines, mask = nn.functional.cosine_similarity(before.float(), after.float(), dim=-1), self.mask
            cosines = cosines[mask.bool()] if mask is not None and mask.shape == cosines.shape else cosines
            self._sums[depth] += cosines.double().sum().cpu()
            self._tokens[depth] += cosines.numel()

        return count

    def means(self) -> list[float]:
        """By depth."""
        return (self._sums / self._tokens.clamp(min=1)).tolist()

    def remove(self) -> None:
        """Count no more."""
        for handle in self._handles:
            handle.remove()


def similarities_of_blocks(model: Model, batches: Sequence[Batch]) -> list[float]:
    """`Similarities` of a model on batches."""
    walk = Resident(model)
    found = Similarities(list(walk.stack))
    try:
        with torch.no_grad():
            for batch in batches:
                found.mask = batch.get("attention_mask")
                walk.forward(batch)
    finally:
        found.remove()
    return found.means()


def _linear_hook(name: str, found: dict[str, Statistics], walk: Resident, turn: dict[str, Any]) -> Callable[..., None]:
    """Count a matrix's inputs. Matrices that are given the same tensor one after another, as q, k and v are, share."""
    own = found[name]

    def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        x, mask = args[0], walk.masks[turn["batch"]]
        if turn["input"] is not None and turn["input"][0] is x and turn["input"][1] == x._version and own.tokens == 0:
            if found[name] is own:
                turn["input"][2].sharers += 1
            found[name] = turn["input"][2]
        else:
            assert found[name] is own, f"{name} was given the input of another matrix in one batch and its own in the next"
            turn["input"] = (x, x._version, own)
            own.add(x, mask)
        turn["reached"].append(name)
        if len(turn["reached"]) == turn["all"]:
            raise _Gathered

    return hook


def _convolution_hook(collector: Statistics) -> Callable[..., None]:
    def hook(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        layer = cast(nn.Conv2d, layer)
        if layer.groups == 1 and not isinstance(layer.padding, str):
            columns = nn.functional.unfold(args[0], layer.kernel_size, layer.dilation, layer.padding, layer.stride)
            collector.add(columns.transpose(1, 2))

    return hook

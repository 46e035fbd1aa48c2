"""What stands where an attention, an MLP or their norm has been taken out."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from modelwright.anatomy import anatomy_of
from modelwright.anatomy._base import Branch
from modelwright.anatomy.removal import keeps_slot, number_slots, remove_blocks
from modelwright.blocks._stored import Described
from modelwright.core.errors import PlanError


class Removed(Described):
    """Adds nothing to the stream: `zeros` for an MLP, `pair` (zeros and no weights) for an attention; a norm gives its `input` back.

    It stores nothing and has no place in the cache.
    """

    kind = "removed"

    def __init__(
        self, *, gives: Literal["zeros", "pair", "input"], dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ):
        super().__init__()
        self.gives = gives

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """hidden_states [..., width] → the same shape."""
        if self.gives == "input":
            return hidden_states
        zeros = hidden_states.new_zeros(()).expand_as(hidden_states)
        return (zeros, None) if self.gives == "pair" else zeros

    def describe(self) -> dict[str, Any]:
        """The kind and what it gives, as a JSON object."""
        return {"kind": self.kind, "gives": self.gives}


@contextlib.contextmanager
def without(module: nn.Module, branch: Branch, stands: nn.Module | None = None) -> Iterator[None]:
    """The model without one attention or MLP, or with another part in its place, for as long as the block lasts."""
    before = {path: module.get_submodule(path) for path in (branch.module, *branch.norms)}
    _take_out(module, branch, stands)
    try:
        yield
    finally:
        for path, part in before.items():
            module.set_submodule(path, part)


def remove_branches(module: nn.Module, gone: Sequence[Branch]) -> None:
    """Take attentions and MLPs out of a model for good, with the norms that serve them alone.

    Blocks that then have neither leave whole. The attentions that stay have the first places in the cache, for its
    length is read at the first one.

    Raises: PlanError, before anything changes, when no attention would be left where the cache's length is read.
    """
    anatomy = anatomy_of(module)
    path = replace_branches(module, dict.fromkeys(gone))
    full = {branch.depth for branch in anatomy.branches(module)}
    blocks: Any = module.get_submodule(path)
    remove_blocks(module, [depth for depth in range(len(blocks)) if depth not in full])
    number_slots(module, path)


def replace_branches(module: nn.Module, stands: Mapping[Branch, nn.Module | None]) -> str:
    """Put other parts into the places of attentions and MLPs for good, or nothing, and number the places in the cache anew.

    Returns the path of the blocks. Raises: PlanError as `remove_branches`.
    """
    if not keeps_slot(module, list(stands)):
        raise PlanError("No attention of the first block's kind would be left, where caches read their length. Keep one of them.")
    path = anatomy_of(module).blocks(module)
    assert path is not None, "branches are those of one row of blocks"
    for branch, layer in stands.items():
        _take_out(module, branch, layer)
    number_slots(module, path)
    return path


def fitting(module: nn.Module, found: Sequence[Branch], order: Sequence[int], number: int) -> tuple[int, ...]:
    """The first so many candidates in an order that can leave together, by their places, sorted."""
    taken: list[int] = []
    for place in order:
        if len(taken) < number and keeps_slot(module, [found[other] for other in (*taken, place)]):
            taken.append(place)
    return tuple(sorted(taken))


def _take_out(module: nn.Module, branch: Branch, stands: nn.Module | None) -> None:
    module.set_submodule(branch.module, stands or Removed(gives="pair" if branch.kind == "attn" else "zeros"))
    for norm in branch.norms:
        module.set_submodule(norm, Removed(gives="input"))

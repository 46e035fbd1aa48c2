"""How an attention or an MLP joins the stream: what it adds in a block's own sum, changed while the block runs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn

Ways = Sequence[Sequence[str]]  # of each attention and MLP of a block, the paths inside it of the norm before it and its own


@contextlib.contextmanager
def joining(block: nn.Module, ways: Ways, give: Callable[[int, Tensor, Tensor], Tensor]) -> Iterator[None]:
    """While a block runs x + part(norm(x)), let each part give `give(number, x, part(norm(x)))` instead, which the block adds to x.

    What a block does to a part's output before it adds it, such as dropout, it does to this.
    """
    entered: dict[int, Tensor] = {}

    def enter(number: int) -> Any:
        def hook(_: nn.Module, args: Any, kwargs: Any) -> None:
            entered[number] = args[0] if args else kwargs["hidden_states"]

        return hook

    def leave(number: int) -> Any:
        def hook(_: nn.Module, args: Any, out: Any) -> Any:
            made = give(number, entered.pop(number), out[0] if isinstance(out, tuple) else out)
            return (made, *out[1:]) if isinstance(out, tuple) else made

        return hook

    handles = []
    for number, (norm, part) in enumerate(ways):
        handles.append(block.get_submodule(norm).register_forward_pre_hook(enter(number), with_kwargs=True))
        handles.append(block.get_submodule(part).register_forward_hook(leave(number)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()

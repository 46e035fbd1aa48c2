"""What goes through a network on its way to C: values, calls, shapes and numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx

Node = Any  # a node of torch.fx, whose arguments are of any type


@dataclass(eq=False)
class Value:
    """Floats that an operation gives or works in; where they lie, as C says it."""

    count: int
    place: str = ""


@dataclass
class Call:
    """A statement of C, with {x}, {y} and so on in the place of what it reads, {out} of what it gives, {scratch} of what it works in."""

    text: str
    reads: dict[str, Value]
    gives: Value
    scratch: Value | None = None
    inplace: bool = False  # what it gives may lie where {x} lies

    def statement(self) -> str:
        """With all places filled in."""
        places = {name: value.place for name, value in self.reads.items()}
        return self.text.format(**places, out=self.gives.place, scratch=self.scratch.place if self.scratch else "")


def shape_of(node: Node) -> tuple[int, ...]:
    """The shape of what a node gives, without the batch."""
    meta = node.meta["tensor_meta"]
    return tuple((meta if isinstance(meta, fx.passes.shape_prop.TensorMetadata) else meta[0]).shape)[1:]


def number_in_c(value: float) -> str:
    """A float32 as C reads it back to the same bits."""
    text = f"{value:.9g}"
    return text + ("f" if set(text) & set(".e") else ".0f")

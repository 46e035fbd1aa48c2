"""What stands in the place of a block of a U-Net that has been taken out: its way around, so that skips keep their channels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from modelwright.blocks._stored import Described
from modelwright.core.errors import ModelError

SHORTCUTS = ("conv_shortcut", "nin_shortcut", "skip_connection", "shortcut")  # names of a block's own way around


class Passing(Described):
    """Gives [rows, out_channels, ...] for [rows, in_channels, ...]: the same, through the block's own 1 × 1 convolution, or the first.

    Where a block reads the stream with a skip behind it, its first channels are the stream.
    """

    kind = "passing"

    def __init__(self, *, in_channels: int, out_channels: int, shortcut: bool = False, bias: bool = True,
                 dtype: torch.dtype | None = None, device: torch.device | str | None = None):  # fmt: skip
        super().__init__()
        self.in_channels, self.out_channels = in_channels, out_channels
        self.shortcut = nn.Conv2d(in_channels, out_channels, 1, bias=bias, dtype=dtype, device=device) if shortcut else None

    @classmethod
    def of(cls, block: nn.Module, given: Tensor, made: Any) -> Passing:
        """What can stand for a block, by what it was given and gave.

        Raises:
            ModelError: it changes the places, gives no one tensor, or has more channels after than before and no 1 × 1 shortcut.
        """
        if not isinstance(made, Tensor) or given.ndim != made.ndim or given.shape[2:] != made.shape[2:]:
            raise ModelError(f"A {type(block).__name__} changes more than channels, so nothing can stand for it. Leave it in.")
        own = next((getattr(block, name) for name in SHORTCUTS if isinstance(getattr(block, name, None), nn.Conv2d)), None)
        before, after = given.shape[1], made.shape[1]
        if own is not None and own.kernel_size == (1, 1) and (own.in_channels, own.out_channels) == (before, after):
            found = cls(in_channels=before, out_channels=after, shortcut=True, bias=own.bias is not None)
            found.shortcut = own
            return found
        if before < after:
            raise ModelError(f"A {type(block).__name__} makes {after} channels of {before} and has no 1 × 1 shortcut. Leave it in.")
        return cls(in_channels=before, out_channels=after)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return hidden_states[:, : self.out_channels] if self.shortcut is None else self.shortcut(hidden_states)

    def describe(self) -> dict[str, Any]:
        """The kind and sizes, as a JSON object."""
        own = {} if self.shortcut is None else {"shortcut": True, "bias": self.shortcut.bias is not None}
        return {"kind": self.kind, "in_channels": self.in_channels, "out_channels": self.out_channels, **own}

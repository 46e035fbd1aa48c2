"""A convolution whose kernel is stored as the parts of a tensor, and which runs as a row of small convolutions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from modelwright.blocks._stored import Stored, parameter
from modelwright.blocks._tensor import TensorStored
from modelwright.maths.tensor_factors import Form, rebuilt

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
RUN: dict[int, Callable[..., Tensor]] = {1: nn.functional.conv1d, 2: nn.functional.conv2d, 3: nn.functional.conv3d}


class TensorConv(TensorStored):
    """A convolution of 1 to 3 dimensions. Stored: part_0, part_1, ... of the kernel as a tensor; bias [out].

    cp and tucker: the tensor [in, kernel, out], with the kernel's sides as one way; in tucker that way stays in the core. It
    runs as channels down to a rank, a small convolution between ranks (in cp each rank by itself), and up to the channels. tt:
    the tensor [in, side, ..., side, out], with a convolution along one side after the other between. Groups share all but the
    last of these. `in_features`: the inputs of one place, channels of a group times the kernel.
    """

    kind = "tensor_conv"

    def __init__(
        self,
        out_channels: int,
        in_channels: int,
        *,
        kernel: Sequence[int],
        form: Form,
        ranks: Sequence[int],
        stride: Sequence[int] | None = None,
        dilation: Sequence[int] | None = None,
        padding: Sequence[int] | None = None,
        padding_mode: str = "zeros",
        groups: int = 1,
        bias: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ):
        super().__init__()
        self.out_channels, self.in_channels, self.groups, self.kernel = out_channels, in_channels, groups, tuple(kernel)
        self.stride, self.dilation = tuple(stride or [1] * len(kernel)), tuple(dilation or [1] * len(kernel))
        self.padding, self.padding_mode = tuple(padding or [0] * 2 * len(kernel)), padding_mode  # last side first, as in `pad`
        self.out_features, self.in_features = out_channels, in_channels // groups * prod(kernel)
        self.hold(form, tensor_shape((out_channels, in_channels // groups, *kernel), form), ranks, dtype, device)
        self.bias = parameter(torch.empty(out_channels, dtype=dtype, device=device) if bias else None)

    @property
    def fixed(self) -> tuple[int, ...]:
        return fixed_ways(self.form)

    def why_not(self, old: nn.Module) -> str:
        return "" if isinstance(old, CONVOLUTIONS) else f"is a {type(old).__name__}, which cannot become a {type(self).__name__}"

    def standing_for(self, old: Any) -> Stored:
        """The layer with the strides, padding, dilation and groups of the convolution whose place it takes."""
        self.in_channels, self.groups, self.stride, self.dilation = old.in_channels, old.groups, tuple(old.stride), tuple(old.dilation)
        self.padding, self.padding_mode = tuple(old._reversed_padding_repeated_twice), old.padding_mode
        return super().standing_for(old)

    def dense(self) -> Tensor:
        """The kernel [out, in / groups, side, ...]."""
        inward, *middle, outward = range(len(self.tensor_shape))
        whole = rebuilt(self.form, self.parts, self.fixed).permute(outward, inward, *middle)
        return whole.reshape(self.out_channels, -1, *self.kernel)

    def forward(self, inputs: Tensor) -> Tensor:
        """inputs [batch, in, side, ...] → [batch, out, side, ...]."""
        sides = len(self.kernel)
        run, ones = RUN[sides], (1,) * sides
        parts = self.parts if self.form != "tucker" else [self.parts[n] for n in (1, 0, 2)]
        inward, *middle, outward = parts
        columns = inward.reshape(-1, self.ranks[0]).mT
        states = run(inputs, self._each(columns.reshape(*columns.shape, *ones)), groups=self.groups)
        mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
        states = nn.functional.pad(states, self.padding, mode) if any(self.padding) else states
        if self.form == "cp":
            kernel = self._each(middle[0].mT.reshape(-1, 1, *self.kernel))
            states = run(states, kernel, stride=self.stride, dilation=self.dilation, groups=len(kernel))
        elif self.form == "tucker":
            core = middle[0].permute(2, 0, 1).reshape(self.ranks[2], self.ranks[0], *self.kernel)
            states = run(states, self._each(core), stride=self.stride, dilation=self.dilation, groups=self.groups)
        for side, core in enumerate(middle if self.form == "tt" else ()):
            shape = [core.shape[1] if n == side else 1 for n in range(sides)]
            kernel = self._each(core.permute(2, 0, 1).reshape(core.shape[2], core.shape[0], *shape))
            strides, dilations = ([each if n == side else 1 for n, each in enumerate(all_)] for all_ in (self.stride, self.dilation))
            states = run(states, kernel, stride=strides, dilation=dilations, groups=self.groups)
        rows = outward.flatten(1).mT if self.form == "tt" else outward
        rows = rows.reshape(self.out_channels, -1, *ones)
        return run(states, rows, self.bias, groups=self.groups)

    def work(self) -> int:
        """Multiplications for one output place, as if every stage ran at as many places."""
        inward, *middle, outward = [part.numel() for part in self.parts]
        if self.form == "tucker":
            inward, middle = middle[0], [inward]
        return self.groups * (inward + sum(middle)) + outward

    def _each(self, kernel: Tensor) -> Tensor:
        """The same kernel for every group."""
        return kernel.repeat(self.groups, *[1] * (kernel.ndim - 1))

    def describe(self) -> dict[str, Any]:
        """The kind, sizes and settings, as a JSON object."""
        return {
            "kind": self.kind,
            "out_channels": self.out_channels,
            "in_channels": self.in_channels,
            "kernel": list(self.kernel),
            "form": self.form,
            "ranks": list(self.ranks),
            "stride": list(self.stride),
            "dilation": list(self.dilation),
            "padding": list(self.padding),
            "padding_mode": self.padding_mode,
            "groups": self.groups,
            "bias": self.bias is not None,
        }


def tensor_shape(shape: Sequence[int], form: Form) -> tuple[int, ...]:
    """The shape of a kernel [out, in, side, ...] as the tensor whose parts are stored."""
    middle = tuple(shape[2:]) if form == "tt" else (prod(shape[2:]),)
    return (shape[1], *middle, shape[0])


def as_tensor(kernel: Tensor, form: Form) -> Tensor:
    """A kernel [out, in, side, ...] as the tensor whose parts are stored."""
    return kernel.movedim(0, -1).reshape(tensor_shape(kernel.shape, form))


def fixed_ways(form: Form) -> tuple[int, ...]:
    """The ways that have no factor."""
    return (1,) if form == "tucker" else ()

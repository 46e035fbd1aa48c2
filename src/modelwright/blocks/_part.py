"""What an adapter is at one layer: a part, and the layer that it stands on."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from modelwright.blocks._stored import Stored

Dense = tuple[Tensor, Tensor | None]  # weight [out, in, ...], or [features] of a norm, and bias [out]


class Layer:
    """A layer under a part: what it gives for inputs, and its weight and bias, parts further below put in.

    The weight is [out, in] whatever the module keeps; of a convolution [out, in, side, ...], of a norm what it multiplies by [features].
    """

    def __init__(self, module: nn.Module, run: Callable[[Tensor], Tensor], dense: Callable[[], Dense]):
        self.module, self._run, self.dense = module, run, dense

    @classmethod
    def plain(cls, module: nn.Module, *others: Any, **named: Any) -> Layer:
        """A module without parts. others, named: what its forward takes beside the inputs."""
        return cls(module, lambda x: module(x, *others, **named), lambda: dense_of(module))

    def under(self, part: Part) -> Layer:
        """The layer with a part on it, for the next part to stand on."""
        return Layer(self.module, lambda x: part(x, self), lambda: part.merged(*self.dense()))

    def __call__(self, x: Tensor) -> Tensor:
        return self._run(x)

    @property
    def weight(self) -> Tensor:
        return self.dense()[0]

    @property
    def bias(self) -> Tensor | None:
        return self.dense()[1]

    def given(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """What the module would give with another weight and bias, in its own dtype."""
        if isinstance(self.module, nn.Linear) or transposed(self.module) or isinstance(self.module, Stored):
            return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
        values = {"weight": kept_as(self.module, weight).to(x.dtype)} | ({} if bias is None else {"bias": bias.to(x.dtype)})
        return torch.func.functional_call(self.module, values, (x,))


class Part(nn.Module, ABC):
    """What one adapter does at one layer. Its parameters train; what it holds fixed are buffers. Both are saved."""

    shared: Any
    hollow: bool = False  # of the right shapes, but its values are not there yet
    selectable: bool = False  # outputs and inputs can be taken from it
    mergeable: bool = True  # there is a weight and a bias with which the layer alone gives the same

    @abstractmethod
    def forward(self, x: Tensor, layer: Layer) -> Tensor:
        """What the layer with this part gives for its inputs x [..., in]: [..., out], in the dtype of the layer's own outputs."""

    def merged(self, weight: Tensor, bias: Tensor | None) -> Dense:
        """The weight and the bias with which the layer alone gives the same; computed in float32, in the weight's dtype."""
        raise NotImplementedError(f"{type(self).__name__} cannot be put into a weight")

    def factors(self) -> tuple[Tensor, Tensor] | None:
        """B [out, r] and A [r, in] with the change of the weight B A, exactly, where the part does nothing else; None otherwise."""
        return None

    def join(self, shared: nn.Module) -> None:
        """Work with what is shared by the parts of all layers, `self.shared`; it is saved once, and not with the part."""
        object.__setattr__(self, "shared", shared)

    def select(self, dim: int, index: Tensor) -> None:
        """Stay on a layer that keeps these outputs (dim 0) or inputs (dim 1) alone; index: int64."""
        raise NotImplementedError(f"{type(self).__name__} cannot lose outputs or inputs")

    def adjust(self, found: dict[str, tuple[int, ...]]) -> None:
        """Make room for values of these shapes, by the names of parameters and buffers, that are loaded next."""

    def _load_from_state_dict(self, state: Any, prefix: str, *others: Any) -> None:
        self.hollow &= not any(name.startswith(prefix) for name in state)
        self.adjust({name.removeprefix(prefix): tuple(value.shape) for name, value in state.items() if name.startswith(prefix)})
        super()._load_from_state_dict(state, prefix, *others)


class Several(Part):
    """Parts on one layer as one part: each stands on those before it; without any it is the layer."""

    def __init__(self, parts: Sequence[Part]):
        super().__init__()
        self.parts = nn.ModuleList(parts)
        self.mergeable = all(part.mergeable for part in parts)

    def forward(self, x: Tensor, layer: Layer) -> Tensor:
        for part in self.each():
            layer = layer.under(part)
        return layer(x)

    def each(self) -> Iterable[Part]:
        """The parts in their order."""
        return cast(Iterable[Part], self.parts)

    def merged(self, weight: Tensor, bias: Tensor | None) -> Dense:
        for part in self.each():
            weight, bias = part.merged(weight, bias)
        return weight, bias


def transposed(module: nn.Module) -> bool:
    """Whether a module keeps its weight as [in, out]."""
    return type(module).__name__ == "Conv1D"


def dense_of(module: Any) -> Dense:
    """The weight [out, in, ...] and the bias of a module; of a norm that adds to its weight the sum, in float32."""
    weight = module.dense() if isinstance(module, Stored) else module.weight
    if offset := offset_of(module):
        weight = weight.float() + offset
    return weight.T if transposed(module) else weight, getattr(module, "bias", None)


def kept_as(module: Any, weight: Tensor) -> Tensor:
    """A weight [out, in, ...] in the layout, and with the offset, in which a module keeps its own."""
    return weight.T if transposed(module) else weight - offset if (offset := offset_of(module)) else weight


def offset_of(module: nn.Module) -> float:
    """What a norm adds to its weight before it multiplies by it: 1 in some models, whose weights are distances from 1; else 0."""
    own = dict(module.named_parameters(recurse=False))
    if "weight" not in own or own["weight"].ndim != 1 or type(module).__module__.startswith("torch."):
        return 0.0
    zeros = {name: torch.zeros(value.shape, device="cpu") for name, value in own.items()}
    return float(torch.func.functional_call(module, zeros, (torch.ones(1, 1, len(zeros["weight"]), device="cpu"),)).any())


def places(x: Tensor, outputs: Tensor, module: Any) -> Tensor:
    """The inputs that each output stands over, [..., in]: of a convolution those under the middle of its kernel."""
    if not isinstance(module, nn.modules.conv._ConvNd):
        return x
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    seen = F.pad(x, module._reversed_padding_repeated_twice, mode=mode)
    sides = len(module.kernel_size)
    for side, (width, stride, step) in enumerate(zip(module.kernel_size, module.stride, module.dilation, strict=True)):
        dim = seen.ndim - sides + side
        seen = seen.index_select(dim, step * (width // 2) + stride * torch.arange(outputs.shape[dim], device=x.device))
    return seen.movedim(-sides - 1, -1)


def placed(values: Tensor, module: Any) -> Tensor:
    """Values [..., out] in the layout of a module's outputs."""
    return values.movedim(-1, -len(module.kernel_size) - 1) if isinstance(module, nn.modules.conv._ConvNd) else values


def sizes_of(module: nn.Module) -> tuple[int, int]:
    """How many outputs and inputs a layer has: the last size of its inputs and outputs, or their channels."""
    if isinstance(module, Stored):
        return module.out_features, module.in_features
    shape = dense_of(module)[0].shape
    return shape[0], shape[0] if len(shape) == 1 else shape[1] * getattr(module, "groups", 1)


def shaped(values: Tensor, outputs: Tensor, module: nn.Module) -> Tensor:
    """Values of the outputs' channels [out], to multiply with what a module gives."""
    if isinstance(module, nn.modules.conv._ConvNd):
        return values.view(-1, *[1] * (outputs.ndim - 2 if outputs.ndim > module.weight.ndim - 1 else outputs.ndim - 1))
    if isinstance(module, (nn.modules.batchnorm._NormBase, nn.GroupNorm)):
        return values.view(-1, *[1] * (outputs.ndim - 2))
    return values

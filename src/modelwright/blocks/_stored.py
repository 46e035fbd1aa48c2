"""What the layers of this package have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn


class Described(nn.Module, ABC):
    """A module that no architecture makes: `config.json` describes it, and `blocks.build` makes it from that.

    Its constructor takes the keys of `describe()` by name, a dtype and a device, and leaves its tensors unfilled.
    """

    kind: ClassVar[str]  # the name of its file
    replaces: str = "Linear"  # the class of the layer that stood in its place

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """The kind, sizes and settings, as a JSON object."""

    @classmethod
    def from_description(
        cls,
        description: dict[str, Any],
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Self:
        """A module without values, from what `describe()` gave."""
        settings = {key: value for key, value in description.items() if key != "kind"}
        return cls(**settings, dtype=dtype, device=device)  # type: ignore[call-arg]

    def extra_repr(self) -> str:
        return ", ".join(f"{key}={value}" for key, value in self.describe().items() if key != "kind")


class Guest(Described):
    """A module that stands inside another, its host, and computes in the host's place, with the host's own work as a part.

    The host's tensors keep their names, and a model with guests is copied, saved and loaded as any other.
    """

    def join(self, host: nn.Module, name: str) -> None:
        """Stand in `host` under this name; a host has one guest."""
        assert "forward" not in vars(host), f"a {type(host).__name__} has a guest already"
        self._host = [host]  # in a list, so that it is no submodule
        host.add_module(name, self)
        host.forward = self.around

    def settle(self, model: nn.Module) -> None:
        """Set what the guest needs of the whole model that it has joined, also when that is loaded."""

    def leave(self) -> None:
        """Let the host be what it was."""
        host = self._host.pop()
        del host.forward
        for name in [name for name, child in host.named_children() if child is self]:
            delattr(host, name)

    def inner(self, *args: Any, **kwargs: Any) -> Any:
        """What the host computes by itself."""
        return type(self._host[0]).forward(self._host[0], *args, **kwargs)

    @abstractmethod
    def around(self, *args: Any, **kwargs: Any) -> Any:
        """What the host computes from now on."""


class _Remade(torch.autograd.Function):
    """x Ŵᵀ + b of a layer, which for the gradient of x makes Ŵ anew, so that no dense weight is kept from one pass to the other."""

    @staticmethod
    def forward(context: Any, inputs: Tensor, bias: Tensor | None, layer: Stored) -> Tensor:  # type: ignore[override]
        context.layer = layer
        return layer.product(inputs, bias)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None, None]:  # type: ignore[override]
        of_bias = gradient.flatten(0, -2).sum(0) if context.needs_input_grad[1] else None
        return gradient @ context.layer.dense().to(gradient.dtype), of_bias, None


class Stored(Described):
    """A layer whose weight is stored in another form than a dense matrix."""

    stands_for_dense: ClassVar[bool] = True  # counts as its dense weight; False when its parts are layers themselves
    dense_work: ClassVar[bool] = False  # multiplies by its dense weight all the same, though its values are fewer
    exact: tuple[str, ...] = ()  # tensors whose dtype is part of the format: `to` another dtype leaves them as they are
    lossless: ClassVar[bool] = False  # holds every bit of the weight, so that it also stands for an embedding and the head tied to it
    other_sizes: bool = False  # than those of the layer that the architecture's config makes in its place, or a bias where that has none
    rounds_inputs: bool = False  # so that no gradient passes through
    out_features: int
    in_features: int
    bias: nn.Parameter | None

    def _apply(self, function: Any, recurse: bool = True) -> Self:
        kept = {name: self._buffers[name] for name in self.exact if self._buffers[name] is not None}
        super()._apply(function, recurse)
        for name, value in kept.items():
            if value is not None and (now := self._buffers[name]) is not None and now.dtype != value.dtype:
                self._buffers[name] = value.to(now.device)
        return self

    @abstractmethod
    def dense(self) -> Tensor:
        """The weight that this layer stands for, [out, in]."""

    def linear(self, inputs: Tensor) -> Tensor:
        """x Ŵᵀ + b with the dense weight, to which no gradient goes: inputs [..., in] → [..., out], in the inputs' dtype."""
        if torch.is_grad_enabled() and inputs.requires_grad:
            return _Remade.apply(inputs, None if self.bias is None else self.bias.to(inputs.dtype), self)
        return self.product(inputs, self.bias)

    def product(self, inputs: Tensor, bias: Tensor | None) -> Tensor:
        """x Ŵᵀ + b, rounded once."""
        return nn.functional.linear(inputs, self.dense().to(inputs.dtype), bias)

    def describe(self) -> dict[str, Any]:
        """The kind, sizes and settings, as a JSON object."""
        sizes = {"kind": self.kind, "out_features": self.out_features, "in_features": self.in_features}
        return sizes | self.settings() | {"bias": self.bias is not None}

    def settings(self) -> dict[str, Any]:
        """What makes such a layer beside its sizes, as a JSON object."""
        return {}

    @property
    def weight(self) -> Tensor:
        """The dense weight, made anew, for code that looks at a linear's weight; empty until parts of it that stand elsewhere are tied."""
        held = [*self.parameters(), *self.buffers()]
        return held[0].new_empty(0) if any(0 in value.shape for value in held) else self.dense()

    def scheme(self) -> dict[str, Any] | None:
        """How compressed-tensors calls the form in which the weight is stored, `format` and `weights`; None where it has no name."""
        return None

    def why_not(self, old: nn.Module) -> str:
        """Why it cannot stand in the place of a layer, as the end of a sentence; "" if it can."""
        if type(old).__name__ in ("Linear", "Conv1D"):
            return ""
        what = "an embedding" if isinstance(old, nn.Embedding) else f"a {type(old).__name__}"
        return f"is {what}, which cannot become a {type(self).__name__}"

    def standing_for(self, old: nn.Module) -> Stored:
        """The layer that goes on in the place of `old`: this one, or another of its tensors that does what `old` did."""
        self.replaces, self.other_sizes = type(old).__name__, hasattr(old, "resized")
        return self

    def take_bias(self, bias: nn.Parameter | None) -> None:
        """Go on with this bias [out]."""
        self.bias = bias

    def work(self) -> int:
        """Multiplications for one input, beside those of parts that are layers themselves."""
        return self.weights() if self.stands_for_dense or self.dense_work else 0

    def weights(self) -> int:
        """How many weights this layer stands for."""
        return self.out_features * self.in_features

    def nonzeros(self) -> int:
        """How many of them are not zero; on the meta device, how many there can be."""
        held = next(iter(self.state_dict().values()))
        return self.weights() if held.is_meta else int(torch.count_nonzero(self.dense()))

    def stored_bytes(self) -> int:
        """The bytes of all tensors that a checkpoint holds of this layer."""
        return sum(tensor.nbytes for tensor in self.state_dict().values())


def in_a_row(ids: Tensor, rows: int) -> Tensor:
    """The ids [...] of a table's rows as [n].

    Raises:
        IndexError: on the processor, one is no row, as of any embedding.
    """
    flat = ids.reshape(-1)
    if flat.device.type == "cpu" and len(flat) and not 0 <= int(flat.min()) <= int(flat.max()) < rows:
        raise IndexError(f"ids of this embedding are 0 to {rows - 1}; got {int(flat.min())} to {int(flat.max())}")
    return flat


def parameter(values: Tensor | None) -> nn.Parameter | None:
    """`values` as a parameter that can be trained, if there are any."""
    return None if values is None else nn.Parameter(values.detach())

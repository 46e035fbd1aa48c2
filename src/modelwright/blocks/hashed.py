"""A linear layer whose weights are read from stored values that all such layers of a model share."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn

from modelwright.blocks._stored import Stored
from modelwright.maths.hashing import Form, Map, Scaling, divisor


class Readers(weakref.WeakSet):
    """The layers that have read an array, as long as they live. A pickle has none: they are seen anew when they read."""

    def __reduce__(self) -> Any:
        return Readers, ()


class HashedLinear(Stored):
    """y = W x + b with W[i] = λ · s(i) · ψ[h(i)]. Stored: memory [size], which is ψ, once for all layers; bias [out].

    Where a weight stands in ψ is computed anew at each use, a slice of rows at a time. The gradient of ψ is Rᵀ g, divided by
    what `scaling` says of all layers that have read ψ (see `maths.hashing.divisor`).
    """

    kind = "hashed"
    stands_for_dense = False
    dense_work = True
    memory: nn.Parameter

    def __init__(
        self,
        out_features: int,
        in_features: int,
        *,
        size: int,
        form: Form,
        seed: int,
        offset: int,
        scale: float,
        scaling: Scaling = "projection",
        bias: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ):
        super().__init__()
        self.out_features, self.in_features, self.scaling = out_features, in_features, scaling
        self.map = Map(form, size, seed, offset, (out_features, in_features), scale)
        self.memory = nn.Parameter(torch.empty(size, dtype=dtype, device=device))
        self.bias = nn.Parameter(torch.empty(out_features, dtype=dtype, device=device)) if bias else None

    def dense(self) -> Tensor:
        """W [out, in], in the dtype of ψ."""
        if not self.memory.numel():  # a model that is being filled, in which ψ is not tied yet
            return self.memory.new_zeros(self.out_features, self.in_features)
        return torch.cat([self.map.read(self.memory, start, stop) for start, stop in self.map.slices()])

    def forward(self, inputs: Tensor) -> Tensor:
        """inputs [..., in] → [..., out]."""
        memory: Any = self.memory
        if not hasattr(memory, "readers"):
            memory.readers = Readers()
        memory.readers.add(self)
        out = _Product.apply(inputs, self.memory, self)
        return out if self.bias is None else out + self.bias

    def divisor(self) -> Tensor:
        """What the gradient of ψ is divided by [size], by all layers that have read it and still do; kept until there are others."""
        memory: Any = self.memory
        maps = sorted({layer.map for layer in memory.readers if layer.memory is memory}, key=lambda one: one.offset)
        key = (maps, self.scaling, memory.device)
        if getattr(memory, "divided_by", (None,))[0] != key:
            memory.divided_by = key, divisor(maps, self.map.size, self.scaling, memory.device)
        return memory.divided_by[1]

    def settings(self) -> dict[str, Any]:
        """What makes such a layer beside its sizes, as a JSON object."""
        return {
            "size": self.map.size,
            "form": self.map.form,
            "seed": self.map.seed,
            "offset": self.map.offset,
            "scale": self.map.scale,
            "scaling": self.scaling,
        }


class _Product(torch.autograd.Function):
    """x Wᵀ, whose backward pass reads W once more, so that nothing as large as W is kept."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, memory: Tensor, layer: HashedLinear) -> Tensor:
        ctx.save_for_backward(inputs, memory)
        ctx.layer = layer
        parts = [inputs @ layer.map.read(memory, start, stop).to(inputs.dtype).T for start, stop in layer.map.slices()]
        return torch.cat(parts, -1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (inputs, memory), layer = ctx.saved_tensors, ctx.layer
        gradient = gradients[0].to(inputs.dtype)
        back = torch.zeros_like(inputs) if ctx.needs_input_grad[0] else None
        total = torch.zeros(layer.map.size, device=memory.device) if ctx.needs_input_grad[1] else None
        for start, stop in layer.map.slices():
            part = gradient[..., start:stop]
            if back is not None:
                back += part @ layer.map.read(memory, start, stop).to(inputs.dtype)
            if total is not None:
                layer.map.add(total, part.flatten(0, -2).T @ inputs.flatten(0, -2), start, stop)
        return back, None if total is None else (total / layer.divisor()).to(memory.dtype), None

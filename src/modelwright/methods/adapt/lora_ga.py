"""Train a low-rank update that begins where the gradient points: LoRA-GA.

Wang, Yu, Li 2024, arXiv:2407.05000, algorithm 1: of the mean gradient G = U S Vᵀ of each weight, A₀ = c V[:, :r]ᵀ and
B₀ = c U[:, r:2r] with c = out^¼ / √γ, and W becomes W - s B₀ A₀, so that no output changes. The first step of both factors then moves
the weight by -η s² c² times the best approximation of G with the rank 2r. From there on it is LoRA. The base is saved with the adapter.
Differs: nothing; peft's own LoRA-GA scales B by the singular values, so that it depends on the loss's unit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor

from modelwright.core.settings import number
from modelwright.methods.adapt._mechanism import Lowered


@dataclass(frozen=True, kw_only=True)
class LoraGa(Lowered):
    """LoRA whose first step is that of full training as nearly as its rank allows; needs text, and saves a base of its own."""

    status: ClassVar[str] = "checked"
    causal: ClassVar[bool] = True
    changes_base: ClassVar[bool] = True
    drops: ClassVar[frozenset[str]] = frozenset({"sparse"})  # the base takes off what the update begins with
    small = dict(rank=2)
    apart = ("directions", "magnitude", "gamma")

    alpha: float = number(16.0, low=1e-6)  # the update is scaled by s, alpha / √rank
    stabilised: bool = True  # rsLoRA; otherwise s is alpha / rank
    directions: Literal["ArB2r", "A2rBr", "ArBr", "random"] = "ArB2r"  # A the first r and B the next, the reverse, in turn, or by chance
    magnitude: Literal["stable", "unit", "gd", "weights"] = "stable"  # c; 1; 1 / s; or the mean root of W's largest singular values / s
    gamma: float = number(16.0, low=1e-6)  # γ, for magnitude: stable

    @classmethod
    def needs(cls) -> tuple[str, ...]:
        return ("gradients", *super().needs())

    def unfit(self, shape: tuple[int, ...]) -> str:
        most = min(shape[0], shape[1]) // 2
        return f"is {shape[0]} × {shape[1]}, and rank {self.rank} takes twice as many directions. Give at most {most}" * (self.rank > most)

    @torch.no_grad()
    def attached(self, layers: Mapping[str, tuple[Self, Any]], gradients: Mapping[str, Tensor]) -> None:
        for path, (local, layer) in layers.items():
            scale, base = layer.scaling["default"], layer.get_base_layer()
            turned = type(base).__name__ == "Conv1D"
            weight = (base.weight.T if turned else base.weight).float().flatten(1)
            up, down = local.factors(gradients[path].flatten(1), weight, scale)
            ends = layer.lora_B["default"].weight, layer.lora_A["default"].weight
            for end, value in zip(ends, (up, down), strict=True):
                end.copy_(value.view_as(end))
            stored = (end.float().flatten(1) for end in ends)  # rounded, as they will be used
            rest = weight - scale * next(stored) @ next(stored)
            base.weight.copy_((rest.T if turned else rest).view_as(base.weight))

    def factors(self, gradient: Tensor, weight: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """B₀ [out, r] and A₀ [r, in] for a gradient and a weight [out, in], and s."""
        rank = self.rank
        left, _, right = torch.svd_lowrank(gradient, q=min(4 * rank, *gradient.shape), niter=4)
        first, second = torch.arange(rank), torch.arange(rank, 2 * rank)
        if self.directions == "ArBr":
            second, first = torch.arange(0, 2 * rank, 2), torch.arange(1, 2 * rank, 2)
        elif self.directions == "A2rBr":
            first, second = second, first
        elif self.directions == "random":
            first, second = torch.randperm(2 * rank).chunk(2)
        size = 1.0
        if self.magnitude == "stable":
            size = gradient.shape[0] ** 0.25 / self.gamma**0.5
        elif self.magnitude == "gd":
            size = 1 / scale
        elif self.magnitude == "weights":
            values = torch.svd_lowrank(weight, q=min(4 * rank, *weight.shape), niter=4)[1]
            size = float((values[:rank] / scale).sqrt().mean())
        return size * left[:, second], size * right[:, first].T

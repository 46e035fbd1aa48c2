"""Drop the neurons that contribute least to each token, as many as the text's perplexity allows: PPL-p% activation sparsity.

Luo, Song, Han, Chen, Xiao, Meng, Deng, Li, Liu, Sun 2024, Sparsing Law, arXiv:2411.02335. An MLP writes Σ aᵢ Wᵢ; neuron i contributes
|aᵢ| ‖Wᵢ‖, and CETT is the mean over tokens of the norm of what contributions up to a threshold write, over the norm of the whole.
Each layer gets the largest threshold whose CETT is at most one limit (`rule: cett`), and that limit is the highest, by bisection,
at which the perplexity rises by `increase` at most, with all layers dropping at once. The notes tell the activation ratio, the share
of neurons that stay. Other rules: `fat` drops where |activation function| is below one size, `top` all but the largest |aᵢ|.
Differs: thresholds are found on `observed` tokens; where even the lowest has too high a CETT, it is 0 and drops zeros alone. The
last step of the bisection is the range over 2 to the power of `halvings`. No method on weights comes after this one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from modelwright.anatomy import anatomy_of
from modelwright.blocks._stored import Stored
from modelwright.blocks.dropping import Dropping
from modelwright.core.errors import LayoutError, PlanError
from modelwright.core.given import Batch
from modelwright.core.gradients import finite_loss, text_loss
from modelwright.core.method import ModelMethod
from modelwright.core.model import Model
from modelwright.core.observed import inputs_of_modules
from modelwright.core.parts import refuse_adapters
from modelwright.core.progress import bar
from modelwright.core.settings import count, number
from modelwright.maths.neurons import Neurons, highest_level

NAME = "dropping"  # of the guest in its host


@dataclass(frozen=True, kw_only=True)
class Activations(ModelMethod):
    """Let MLPs drop their weak neurons token by token, and tell how many: a measure; saves no time without sparse kernels."""

    status: ClassVar[str] = "checked"
    causal: ClassVar[bool] = True
    wants: ClassVar[frozenset[str]] = frozenset()
    drops: ClassVar[frozenset[str]] = frozenset({"float"})
    neutral = dict(increase=0.0)

    increase: float = number(0.01, low=0)  # of the text's perplexity, as a share of it; 0 drops zeros alone
    rule: Literal["cett", "fat", "top"] = "cett"  # what drops: weak contributions, small activations, all but the largest
    limit: float | None = number(None, low=0)  # in the place of a search: the CETT, the least activation, or the share that drops
    halvings: int = count(20, low=0)  # of the range in which the level is searched
    observed: int = count(4096, unit="tokens")  # of the calibration text, by which thresholds and ratios are found

    def problems(self) -> list[str]:
        return ["limit is a share with these rules, and above 1."] * (self.rule != "fat" and (self.limit or 0) > 1)

    def model(self, model: Model, calibration: Sequence[Batch], notes: list[str]) -> Model:
        refuse_adapters(self, model)
        hosts = self.hosts(model.module)
        before = finite_loss(model, calibration, self.name())
        seen = inputs_of_modules(model, hosts, calibration, self.observed)
        cett = self.rule == "cett"
        parts: list[Any] = [Neurons(seen[path], matrix(model.module, path)) if cett else seen[path].shape[1] for path in hosts]
        most = 1.0
        if self.rule == "fat":
            most = max(float(model.module.get_submodule(path)(seen[path]).abs().max()) for path in hosts)
        guests = self.seat(model.module, hosts)

        def allowed(level: float) -> bool:
            tick()
            self.set(guests, parts, level)
            return text_loss(model, calibration) - before <= math.log1p(self.increase)

        level = self.limit
        if level is None:
            with bar(self.name(), self.halvings) as tick:
                level = highest_level(allowed, most, self.halvings) if self.increase else 0.0
        self.set(guests, parts, level)
        after, ratios = text_loss(model, calibration), self.ratios(model, hosts, guests, calibration)
        notes += [
            f"{self.name()}: of the neurons {sum(ratios) / len(ratios):.4f} stay in a token, by rule {self.rule} at limit {level:.6g}; "
            f"in each MLP, first to last: {', '.join(f'{ratio:.4f}' for ratio in ratios)}",
            f"{self.name()}: the perplexity of the calibration text goes from {math.exp(before):.6g} to {math.exp(min(after, 700)):.6g}",
            f"{self.name()}: what is dropped is computed first and then 0, which saves no time here; kernels that pass over zeros would",
        ]
        return model

    def hosts(self, module: nn.Module) -> list[str]:
        """The paths of what neurons are dropped in: the matrices that they write through, or their activation functions."""
        role = anatomy_of(module).role
        downs = [path for path, _ in module.named_modules() if (role(path) or ("",))[0] == "mlp.down"]
        downs = [path for path in downs if path.rpartition(".")[0] not in downs]
        if not downs:
            raise LayoutError(f"{self.name()} chooses no weight: this model has no mlp.down, through which neurons write.")
        hosts = [function_of(module, path) for path in downs] if self.rule == "fat" else downs
        if any(isinstance(child, Dropping) for child in module.modules()):
            raise PlanError(f"{self.name()}: this model drops neurons already. Start from the model before that.")
        return hosts

    def seat(self, module: nn.Module, hosts: Sequence[str]) -> list[Dropping]:
        """Guests in their hosts that drop nothing yet."""
        guests = []
        for path in hosts:
            host = module.get_submodule(path)
            like = next(value for value in module.parameters() if value.is_floating_point())
            width = 0 if self.rule == "fat" else matrix(module, path).shape[1]
            drops: Any = {"cett": {"features": width}, "fat": {"least": 0.0}, "top": {"most": width}}[self.rule]
            guests.append(Dropping(**drops, dtype=like.dtype, device=like.device))
            guests[-1].join(host, NAME)
        return guests

    def set(self, guests: Sequence[Dropping], parts: Sequence[Any], level: float) -> None:
        """Let guests drop as much as a level says; parts: the neurons of each, or how many there are."""
        for part, guest in zip(parts, guests, strict=True):
            if self.rule == "cett":
                guest.set_thresholds(torch.where(part.norms > 0, part.threshold(level) / part.norms, torch.inf))
            elif self.rule == "fat":
                guest.least = level
            else:
                guest.most = max(round((1 - level) * part), 1)

    def ratios(self, model: Model, hosts: Sequence[str], guests: Sequence[Dropping], calibration: Sequence[Batch]) -> list[float]:
        """The share of neurons that stay in each MLP while all drop."""
        seen = inputs_of_modules(model, hosts, calibration, self.observed)
        values = [guest.inner(seen[path]) if self.rule == "fat" else seen[path] for path, guest in zip(hosts, guests, strict=True)]
        return [float((guest.kept(value) & (value != 0)).double().mean()) for guest, value in zip(guests, values, strict=True)]

    def passes(self, blocks: int) -> float:
        return self.halvings + 4

    def planned(self, module: Any, donors: int) -> Any:
        self.seat(module, self.hosts(module))
        return module


def matrix(module: nn.Module, path: str) -> Tensor:
    """The matrix [out, in] of a layer, however it is stored."""
    layer = module.get_submodule(path)
    if isinstance(layer, Stored):
        return layer.dense()
    weight = layer.get_parameter("weight").detach()
    return weight.T if type(layer).__name__ == "Conv1D" else weight


def function_of(module: nn.Module, path: str) -> str:
    """The path of the activation function beside a matrix."""
    owner = path.rpartition(".")[0]
    found = [
        name for name, child in module.get_submodule(owner).named_children()
        if not any(True for _ in child.parameters()) and not isinstance(child, (nn.Dropout, nn.Identity))
    ]  # fmt: skip
    if len(found) != 1:
        raise LayoutError(f"The MLP of {path} is laid out otherwise than with one activation function beside it. Use rule: cett.")
    return f"{owner}.{found[0]}"

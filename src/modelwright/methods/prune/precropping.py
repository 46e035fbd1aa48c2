"""Make a convolutional network narrower before it is trained, each layer by the density that pruning would leave it: PreCropping.

Cai, Hua, Chen, Zhang, Shrivastava, Wu 2022, arXiv:2203.02549. Only how dense each layer is matters, not which weights stay.
Densities p come from SynFlow (Tanaka et al. 2020, arXiv:2006.05467): with all tensors made positive and an input of ones, the
scores |w ∂R/∂w| of the summed output R, of which ρ^(k/rounds) stays in round k; or from SynFlow in expectation, the p that
maximises Σ log p under the budget (`maths.allocation.even`). A layer both of whose ends may shrink keeps √p of its channels,
one of whose ends stays keeps p. Channels inside residual blocks shrink; with `scope: model` the stages too, by the mean p of
what they sum.
Differs: the paper's code is not published, and its text was not at hand: rounds, exponents and scopes are as it is known by
others. The level of the water, or a factor of all densities, is then moved until the parameters of the whole network, what
stays as it is included, come nearest to the budget without going over it. A budget in FLOPs is not offered. Without `fresh` the
weights stay, of the channels with the largest sums of sizes, which the paper does not do.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from modelwright.anatomy import Units, anatomy_of
from modelwright.core.errors import PlanError, SiteError
from modelwright.core.method import ModelMethod
from modelwright.core.model import Model, unwrapped
from modelwright.core.settings import count, fraction
from modelwright.maths.allocation import even
from modelwright.maths.masks import lowest
from modelwright.methods.prune._units import loads_otherwise, per_member, take_out

LAYERS = (nn.Linear, nn.modules.conv._ConvNd)


@dataclass(frozen=True, kw_only=True)
class PreCropping(ModelMethod):
    """Make a convolutional network narrower, layer by layer, until `keep` of its parameters is left, and draw its weights anew."""

    status: ClassVar[str] = "checked"
    neutral = dict(keep=1.0, fresh=False)

    keep: float = fraction(0.5, low=1e-6)  # of the parameters
    density: Literal["expected", "synflow"] = "expected"  # of each layer, from its size alone; or from how much flows through its weights
    scope: Literal["block", "model"] = "block"  # channels inside residual blocks and chains; or those of the stages too
    fresh: bool = True  # draw the weights anew, for training; or keep those of the largest channels
    rounds: int = count(100)  # of SynFlow
    side: int = count(32, unit="pixels")  # of the input of ones

    def model(self, model: Model, rng: torch.Generator, notes: list[str]) -> Model:
        module = unwrapped(model.module)
        found = self.found(module)
        layers = {path: child for path, child in module.named_modules() if isinstance(child, LAYERS)}
        flow = synflow(module, layers, self.keep, self.rounds, self.side) if self.density == "synflow" else None
        widths = self.widths(module, found, layers, flow)
        sizes = {name: value.detach().abs() for name, value in module.named_parameters()}
        with torch.no_grad():
            scores = [torch.stack([part.sum((1, 2)) for part in per_member(units, sizes)]).sum(0) for units in found]
            kept = [score.topk(width).indices.sort().values.tolist() for score, width in zip(scores, widths, strict=True)]
        if why := take_out(module, found, kept):
            notes.append(loads_otherwise(self.name(), why))
        if self.fresh:
            with torch.random.fork_rng():
                torch.manual_seed(int(torch.randint(1 << 48, (), generator=rng)))
                drawn: list[Any] = [child for child in module.modules() if hasattr(child, "reset_parameters")]
                for child in drawn:
                    child.reset_parameters()
        left = ", ".join(f"{units.scope} {width} of {units.count}" for units, width in zip(found, widths, strict=True))
        notes.append(f"{self.name()}: channels that are left: {left}")
        return model

    def planned(self, module: Any, donors: int) -> Any:
        layers = {path: child for path, child in module.named_modules() if isinstance(child, LAYERS)}
        found = self.found(module)
        take_out(module, found, [list(range(width)) for width in self.widths(module, found, layers, None)])
        return module

    def found(self, module: nn.Module) -> list[Units]:
        """The channels that may shrink. Raises SiteError where there are none."""
        anatomy, found, lacking = anatomy_of(module), [], []
        for kind in ("channels", "stages")[: 1 + (self.scope == "model")]:
            try:
                found += anatomy.units(module, kind)
            except SiteError as error:
                lacking.append(error)
        if not found:
            raise lacking[0]
        return found

    def widths(self, module: nn.Module, found: Sequence[Units], layers: dict[str, Any], flow: dict[str, float] | None) -> list[int]:
        """How many channels of each entry stay, by densities in expectation, or those of `flow` by the layers' paths.

        Raises PlanError where even one of each is too many parameters.
        """
        shapes = {name: value.shape for name, value in module.named_parameters()}
        shrinks = {span.name.rpartition(".")[0] for units in found for span in units.spans if span.output}
        given = [self.given(units, layers) for units in found]
        total = sum(map(math.prod, shapes.values()))

        def made(factor: float) -> list[int]:
            if flow is None:
                shares = even([layer.weight.numel() for layer in layers.values()], min(1.0, factor * self.keep))
                dense = dict(zip(layers, shares, strict=True))
            else:
                dense = {path: min(1.0, factor * share) for path, share in flow.items()}
            means = [sum(dense[path] for path in paths) / len(paths) for paths in given]
            both = [units.kind == "stages" or units.scope in shrinks for units in found]
            ratios = [mean**0.5 if two else mean for mean, two in zip(means, both, strict=True)]
            return [max(1, round(units.count * ratio)) for units, ratio in zip(found, ratios, strict=True)]

        if (least := left_of(shapes, found, made(0.0)) / total) > self.keep:
            raise PlanError(
                f"{self.name()}: keep={self.keep} cannot be met; what may shrink leaves {least:.4f}. Keep more, or scope: model."
            )
        low, high = 0.0, 1e6
        for _ in range(100):
            middle = (low + high) / 2
            low, high = (middle, high) if left_of(shapes, found, made(middle)) <= self.keep * total else (low, middle)
        return made(low)

    def given(self, units: Units, layers: dict[str, Any]) -> list[str]:
        """The layers whose densities make the width: what gives the channels; of stages everything that does."""
        if units.kind == "channels":
            return [units.scope]
        return sorted({span.name.rpartition(".")[0] for span in units.spans if not span.output} & layers.keys())


def left_of(shapes: dict[str, torch.Size], found: Sequence[Units], widths: Sequence[int]) -> int:
    """The parameters that are left with so many units of each entry."""
    left = {name: list(shape) for name, shape in shapes.items()}
    for units, width in zip(found, widths, strict=True):
        for span in units.spans:
            left[span.name][span.dim] -= (units.count - width) * span.width
    return sum(map(math.prod, left.values()))


def synflow(module: nn.Module, layers: dict[str, Any], keep: float, rounds: int, side: int) -> dict[str, float]:
    """The share of each layer's weights that SynFlow keeps, by its path."""
    positive = copy.deepcopy(module).double().eval()
    for value in (*positive.parameters(), *positive.buffers()):
        value.data.abs_()
    weights: list[Tensor] = [positive.get_parameter(f"{path}.weight").requires_grad_() for path in layers]
    first = next(iter(layers.values()))
    ones = [1, first.in_features] if isinstance(first, nn.Linear) else [1, first.in_channels, *[side] * (first.weight.ndim - 2)]
    given = torch.ones(ones, dtype=torch.float64, device=weights[0].device)
    for number in range(1, rounds + 1):
        with torch.enable_grad():
            found = positive(given)
            flow = (found if isinstance(found, Tensor) else found[0]).sum()
        grads = torch.autograd.grad(flow, weights)
        score = torch.cat([(weight.detach() * grad).flatten() for weight, grad in zip(weights, grads, strict=True)])
        gone = lowest(score[None], 1 - keep ** (number / rounds))[0].split([weight.numel() for weight in weights])
        for weight, mask in zip(weights, gone, strict=True):
            weight.data.masked_fill_(mask.view_as(weight), 0)
    return {path: max(1, int((weight != 0).sum())) / weight.numel() for path, weight in zip(layers, weights, strict=True)}

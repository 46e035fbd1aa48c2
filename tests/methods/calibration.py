"""What method tests share: inputs whose columns depend on each other and differ in size, and models that take text."""

from __future__ import annotations

import torch
from tiny import tiny, tiny_inputs
from torch import Tensor

from modelwright.core import data, walk
from modelwright.core.contract import letters
from modelwright.core.given import Given
from modelwright.core.model import Model, open
from modelwright.core.statistics import Statistics
from modelwright.maths.second_order import STRIP, Moment

SHORT = dict(tokens=4096, batch=8, length=32, learning_rate=3e-3)  # a training that a tiny model learns from
TEXT = ["the quick brown fox jumps over the lazy dog, and then the dog jumps over the fox. " * 40]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def correlated(tokens: int, width: int, seed: int = 1) -> Tensor:
    """Inputs [tokens, width]: every column mixes all the others, and later columns are larger."""
    mixed = normal(tokens, width, seed=seed) @ (normal(width, width, seed=seed + 1) / width**0.5 + torch.eye(width))
    return mixed * torch.linspace(0.2, 2, width)


def gathered(inputs: Tensor, *gathers: str) -> Statistics:
    """The statistics of inputs [tokens, in], as the driver gathers them."""
    statistics = Statistics(inputs.shape[1], gathers or ("norm", "moment"))
    statistics.add(inputs)
    return statistics


def with_moment(moment: Tensor) -> Statistics:
    """Statistics whose second moment is this matrix [in, in]."""
    statistics = Statistics(len(moment), ("norm", "moment"))
    statistics.tokens = 1
    statistics._moment, statistics._square = Moment(len(moment)), moment.diagonal().clone()
    for start, strip in zip(range(0, len(moment), STRIP), statistics._moment.strips, strict=True):
        strip.copy_(moment[start : start + STRIP, start:])
    return statistics


def damped(moment: Tensor, damp: float = 0.01) -> Tensor:
    """H + damp · mean(diag H) · I, float64."""
    exact = moment.double()
    return exact + damp * exact.diagonal().mean() * torch.eye(len(exact), dtype=exact.dtype)


def cost(weight: Tensor, result: Tensor, moment: Tensor) -> float:
    """tr(ΔW H ΔWᵀ): what the layer's outputs lose."""
    change = (weight - result).double()
    return torch.trace(change @ moment.double() @ change.T).item()


def batches(module: torch.nn.Module, number: int = 3) -> list[dict[str, Tensor]]:
    """Calibration batches with padding in them."""
    return [tiny_inputs(module, seed) for seed in range(number)]


def lettered(kind: str = "llama", seed: int = 0, **config: object) -> Model:
    """A tiny model with a tokenizer of single characters."""
    return open(tiny(kind, seed=seed, **config), tokenizer=letters())


def blocks_of(model: Model, *roles: str) -> list[tuple[str, Tensor]]:
    """(name, weight [out, in]) of the matrices inside the blocks, of some roles or of all."""
    from modelwright.core.model import weight_of

    found = []
    for site in model.sites():
        if site.depth is not None and (not roles or site.role in roles) and "norm" not in site.role:
            weight = weight_of(model.module, site)
            if weight is not None:
                found.append((site.name, weight))
    return found


def taught(kind: str = "llama") -> tuple[Model, Given]:
    """A tiny model that has begun to know its text, and that text."""
    from modelwright.methods.train import Train

    model, given = lettered(kind), Given(data=data.read(TEXT))
    return walk.change(model, Train(**SHORT), given), given


def surprise(model: Model) -> float:
    """The loss of a model on the text that it was taught, in nats for each token."""
    from modelwright.core.training import next_token

    ids = torch.tensor([model.tokenizer(TEXT[0])["input_ids"][:256]])
    with torch.no_grad():
        return float(next_token(model.module, ids, torch.ones_like(ids, dtype=torch.bool))[0])

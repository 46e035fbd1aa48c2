"""How routers of tokens (`blocks.token_router`) learn and are set, beside a model that stays as it is."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from modelwright.blocks.token_router import TokenRouter
from modelwright.maths.divergence import mixed_kl

from .given import Batch
from .gradients import logits_of
from .model import Model
from .passage import Resident


def distances(module: nn.Module, routers: Sequence[TokenRouter], ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """On ids [batch, length], three scalars with gradients in the routers.

    The mean cross-entropy of what they choose to the static choice; the mean distance of the share that passes from a block's own;
    the KL of the whole model's predictions to those of the routed one.
    """
    module.eval()
    with torch.no_grad(), mode(routers, "dense"):
        wanted = logits_of(module(input_ids=ids, use_cache=False))
    with mode(routers, "soft"):
        found = logits_of(module(input_ids=ids, use_cache=False))
    guide, balance = [], []
    for router in routers:
        if router.hidden:
            guide.append(F.binary_cross_entropy_with_logits(router.seen["logit"], router.seen["static"].float()))
            balance.append(((1 - router.seen["keep"].float()).mean() - router.skipped).abs())
    return torch.stack(guide).mean(), torch.stack(balance).mean(), mixed_kl(wanted, found)


def shifted(model: Model, routers: Sequence[TokenRouter], calibration: Sequence[Batch]) -> list[float]:
    """Shift each router, first to last, so that its share of the text's tokens passes; the shares that then pass."""
    with torch.no_grad():
        for router in routers:
            if router.hidden:
                order = torch.cat(observed(model, router, calibration, "logit")).sort().values.double()
                gone = min(round(router.skipped * len(order)), len(order) - 1)
                middle = (order[gone - 1] + order[gone]) / 2 if gone else order[0] - 1
                router.second.bias.sub_(middle.to(router.second.bias.dtype))
        return [1 - float(torch.cat(observed(model, router, calibration, "keep")).double().mean()) for router in routers]


@contextlib.contextmanager
def mode(routers: Sequence[TokenRouter], name: str) -> Iterator[None]:
    """All routers decide in another way."""
    for router in routers:
        router.mode = name
    try:
        yield
    finally:
        for router in routers:
            router.mode = "router"


def observed(model: Model, router: TokenRouter, calibration: Sequence[Batch], name: str) -> list[Tensor]:
    """What a router saw of the text's tokens that are no padding, batch by batch."""
    walk, found = Resident(model), []
    for batch in calibration:
        walk.forward(batch)
        mask = batch.get("attention_mask")
        value = router.seen[name]
        found.append(value[mask.bool()] if mask is not None else value.flatten())
    return found

"""Merges of tensors in memory."""

import torch
from torch import Tensor


def merged(method, weight: Tensor, donors: list[Tensor], seed: int = 0) -> Tensor:
    """The whole tensor that a method of the merge family makes; `seed` for those that draw."""
    drawn = [torch.Generator().manual_seed(seed)] if "rng" in method.needs() else []
    return method.tensor(weight, donors, *drawn).whole()

"""Merges of tensors in memory."""

from typing import Any

import torch
from torch import Tensor


def merged(method, weight: Tensor, donors: list[Tensor], seed: int = 0) -> Tensor:
    """The whole tensor that a method of the merge family makes; `seed` for those that draw."""
    extras: dict[str, Any] = {"rng": torch.Generator().manual_seed(seed)} if "rng" in method.needs() else {}
    if "survey" in method.needs():
        extras["survey"] = method.survey(weight.reshape(-1), [donor.reshape(-1) for donor in donors])
    if "notes" in method.needs():
        extras["notes"] = []
    return method.tensor(weight, donors, **extras).whole()

"""Attention within groups of tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from modelwright.blocks._stored import Guest
from modelwright.core.errors import ModelError


class SlicedAttention(Guest):
    """Lets the tokens of each of `groups` groups attend to each other alone; with a seed the tokens change places first, and back.

    Shen, Liu, Xing 2022, arXiv:2111.05297, section 3.3. For attentions without a mask, in which all tokens see all. A group is
    so many consecutive tokens, one more in the first ones where the groups do not divide them. The order of the tokens follows
    from the seed and their number, so that it is the same at each call. It stores nothing.
    """

    kind = "sliced_attention"

    def __init__(self, *, groups: int, seed: int | None = None, dtype: torch.dtype | None = None, device: torch.device | str | None = None):
        super().__init__()
        self.groups, self.seed = groups, seed

    def order(self, tokens: int) -> Tensor:
        """The token that comes to each place [tokens]."""
        return torch.arange(tokens) if self.seed is None else torch.randperm(tokens, generator=torch.Generator().manual_seed(self.seed))

    def around(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        """hidden_states [batch, tokens, width] → the same shape, and no weights."""
        if attention_mask is not None:
            raise ModelError("Attention within groups of tokens was given a mask; it is for tokens that all see all. Give no mask.")
        tokens = hidden_states.shape[1]
        groups, order = min(self.groups, tokens), self.order(tokens).to(hidden_states.device)
        size, more = divmod(tokens, groups)
        parts = hidden_states[:, order].split([more * (size + 1), (groups - more) * size], 1)
        made = [self.within(part, count, kwargs) for part, count in zip(parts, (more, groups - more), strict=True) if count]
        return torch.cat(made, 1)[:, order.argsort()], None

    def within(self, x: Tensor, groups: int, kwargs: dict[str, Any]) -> Tensor:
        """What the host gives for x [batch, tokens, width], of which so many groups of one size see themselves alone."""
        found = self.inner(x.reshape(len(x) * groups, -1, x.shape[2]), **kwargs)
        return (found[0] if isinstance(found, tuple) else found).reshape(x.shape)

    def describe(self) -> dict[str, Any]:
        """The kind, the groups and the seed, as a JSON object."""
        return {"kind": self.kind, "groups": self.groups, "seed": self.seed}

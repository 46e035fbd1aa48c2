"""What decides for each token whether a block computes it or lets it pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from modelwright.anatomy import anatomy_of
from modelwright.blocks._stored import Guest
from modelwright.core.errors import ModelError, PlanError

FEATURES = 4  # position, attention that the token gives itself, its rank in what the token attends to, the block's share
SCORES = "token_scores"  # the attribute in which activations carry scores from block to block


NAME = "token_router"  # of the guest in its block
MOST = 0.95  # of the tokens that may pass a block


class TokenRouter(Guest):
    """Stands in a block: h' = h + z (Block(h) - h), with z 0 or 1 for each token, by a small MLP on four numbers.

    Stored: first.weight [hidden, 4], first.bias, second.weight [1, hidden], second.bias; none where hidden is 0, and then the
    block computes all tokens. The attention of what was computed last for a token tells the next router. Keys and values of all
    tokens are computed, so that the cache is whole. It needs eager attention.
    """

    kind = "token_router"

    def __init__(
        self,
        *,
        attention: str,
        hidden: int,
        skipped: float,
        longest: int,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ):
        super().__init__()
        self.attention, self.hidden, self.skipped, self.longest = attention, hidden, skipped, longest
        if hidden:
            self.first = nn.Linear(FEATURES, hidden, dtype=dtype, device=device)
            self.second = nn.Linear(hidden, 1, dtype=dtype, device=device)
        self.mode = "router"  # or "static": by the attention that tokens get, "soft": with a gradient, "dense": all
        self.seen: dict[str, Tensor] = {}  # of the last call
        self._weights: Tensor | None = None

    def join(self, host: nn.Module, name: str) -> None:
        """Stand in a block, and watch its attention."""
        super().join(host, name)
        if self.attention:
            host.get_submodule(self.attention).register_forward_hook(self._watch)

    def settle(self, model: Any) -> None:
        """Let the model's attentions tell their weights."""
        model.set_attn_implementation("eager")

    def _watch(self, _: nn.Module, args: Any, found: Any) -> None:
        self._weights = found[1] if isinstance(found, tuple) else None

    def around(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """hidden_states [batch, tokens, width] → what the block gives, with the tokens that pass as they came."""
        before = getattr(hidden_states, SCORES, None)
        self._weights = None
        found = self.inner(hidden_states, *args, **kwargs)
        after = found[0] if isinstance(found, tuple) else found
        if self._weights is None and self.attention:
            raise ModelError('Routers of tokens read attention weights, and this model gives none. Call set_attn_implementation("eager").')
        scores = before if self._weights is None else scores_of(self._weights)
        self._weights = None
        keep = torch.ones_like(after[..., 0])
        if self.hidden and self.mode != "dense":
            if before is None:
                raise ModelError("A router of tokens was given activations without the scores of the block before. Run whole models.")
            keep = self.keep(before, kwargs.get("position_ids"), after.dtype)
            after = hidden_states + keep[..., None] * (after - hidden_states) if self.mode == "soft" else torch.where(
                keep[..., None] > 0, after, hidden_states)  # fmt: skip
            scores = torch.where(keep > 0, before if scores is None else scores, before)
        self.seen["keep"] = keep
        setattr(after, SCORES, scores)
        return (after, *found[1:]) if isinstance(found, tuple) else after

    def keep(self, scores: Tensor, positions: Tensor | None, dtype: torch.dtype) -> Tensor:
        """1 where a token is computed, 0 where it passes [batch, tokens]; scores [4, batch, tokens] of the block before."""
        own, rank, received, place = scores
        place = place if positions is None else positions.expand_as(place)
        static = self.static(received, place == 0)
        if self.mode == "static":
            return static.to(dtype)
        inputs = torch.stack([place / self.longest, own, rank, torch.full_like(own, self.skipped)], -1)
        logit = self.second(torch.relu(self.first(inputs.to(self.first.weight.dtype)))).squeeze(-1).float()
        self.seen |= {"logit": logit, "static": static}
        if self.mode == "router":
            return (logit > 0).to(dtype)
        chance = torch.rand_like(logit).clamp(1e-6, 1 - 1e-6).logit()
        soft = (logit + chance).sigmoid()
        return (((soft > 0.5).float() - soft).detach() + soft).to(dtype)

    def static(self, received: Tensor, first: Tensor) -> Tensor:
        """Where the attention that tokens get [batch, tokens] is highest, in the share that is computed; first and last too."""
        always = first.clone()
        always[:, -1] = True
        gone = int(self.skipped * received.shape[1])
        order = received.masked_fill(always, torch.inf).argsort(dim=1, stable=True)[:, :gone]
        return torch.ones_like(always).scatter(1, order, False) | always

    def describe(self) -> dict[str, Any]:
        """The kind, where the attention is, and the numbers, as a JSON object."""
        return {"kind": self.kind, "attention": self.attention, "hidden": self.hidden, "skipped": self.skipped, "longest": self.longest}


def scores_of(weights: Tensor) -> Tensor:
    """Of attention weights [batch, heads, queries, keys], the queries last of the keys, numbers of each query [4, batch, queries].

    They are: the attention that it gives itself, the share of the keys that it attends to that get more, the mean
    attention that it gets from itself and later ones (0 where not all queries are here), and its place.
    """
    mean = weights.detach().float().mean(1)
    queries, keys = mean.shape[1:]
    place = torch.arange(keys - queries, keys, device=mean.device)
    own = mean.gather(2, place.expand(len(mean), -1)[..., None]).squeeze(2)
    rank = (mean > own[..., None]).sum(2) / (mean > 0).sum(2)
    received = mean.sum(1) / (keys - place) if queries == keys else torch.zeros_like(own)
    return torch.stack([own, rank, received, place.expand_as(own).float()])


def route_tokens(module: nn.Module, skipped: float, hidden: int, name: str) -> list[TokenRouter]:
    """Put a router into each block that has an attention before it, with a share for each so that the mean over blocks is `skipped`.

    Raises: PlanError, before anything changes, when it speaks of more tokens than may pass; `name` is the method's.
    """
    branches, path = anatomy_of(module).branches(module), anatomy_of(module).blocks(module)
    blocks: Any = module.get_submodule(path or "")
    if any(isinstance(child, TokenRouter) for child in module.modules()):
        raise PlanError(f"{name}: this model routes tokens already. Start from the model before that.")
    attentions = {branch.depth: branch.module.removeprefix(f"{path}.{branch.depth}.") for branch in branches if branch.kind == "attn"}
    first = min(attentions, default=len(blocks))
    free = len(blocks) - 1 - first
    if skipped * len(blocks) > MOST * free:
        raise PlanError(
            f"{name}: {skipped:g} of the tokens are to pass {len(blocks)} blocks on average, and {max(free, 0)} may let "
            f"{MOST:g} pass at most. Let fewer pass."
        )
    like = next(value for value in module.parameters() if value.is_floating_point())
    longest = int(getattr(getattr(module, "config", None), "max_position_embeddings", None) or 4096)
    routers = []
    for depth, block in enumerate(blocks):
        inner = hidden if depth > first else 0
        router = TokenRouter(attention=attentions.get(depth, ""), hidden=inner, longest=longest, dtype=like.dtype, device=like.device,
                             skipped=skipped * len(blocks) / free if inner else 0.0)  # fmt: skip
        router.join(block, NAME)
        routers.append(router)
    routers[0].settle(module)
    return routers

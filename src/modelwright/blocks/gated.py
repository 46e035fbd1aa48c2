"""Sums of adapters with gates: y + Σ_k g_k ⊙ f_k(x), with updates f_k that are held or train, and gates g_k of many kinds.

A gate is a module that is called with the layer's outputs [..., out] and with the list of what the updates give, and gives as many
tensors that multiply these. What it needs of the whole model is `shared` by the gates of all layers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from modelwright.blocks._part import Dense, Layer, Part, placed, places
from modelwright.blocks.bottlenecks import ACTIVATIONS, Activation
from modelwright.blocks.reparametrised import Product, centred
from modelwright.core.errors import ModelError


class Source(Product):
    """U φ(D h) of an adapter that was trained before; it is held."""

    def __init__(self, up: Tensor, down: Tensor, activation: Activation = "none"):
        super().__init__(up, down)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        return ACTIVATIONS[self.activation](x.to(self.down.dtype) @ self.down.T) @ self.up.T


class Gated(Part):
    """y + Σ_k g_k ⊙ f_k(h), where h is what the layer is given, or `after` what it gives.

    sources: f_k. dropout: of what they give, while training.
    """

    mergeable = False

    def __init__(self, sources: Iterable[Product], gate: nn.Module, *, after: bool = False, dropout: float = 0.0):
        super().__init__()
        self.sources, self.gate, self.after, self.dropout = nn.ModuleList(sources), gate, after, nn.Dropout(dropout)

    def join(self, shared: nn.Module) -> None:
        super().join(shared)
        object.__setattr__(self.gate, "shared", shared)

    def forward(self, x: Tensor, layer: Layer) -> Tensor:
        own = layer(x)
        seen = places(own if self.after else x, own, layer.module)
        changes = [self.dropout(source(seen)) for source in self.sources]
        if not changes:
            return own
        gates = self.gate(places(own, own, layer.module) if self.after else own, changes)
        total = torch.stack([gate * change for gate, change in zip(gates, changes, strict=True)]).sum(0)
        return own + placed(total, layer.module).to(own.dtype)

    def take(self, pairs: Sequence[tuple[Tensor, Tensor]], activation: Activation = "none") -> None:
        """Hold these U [out, r] and D [r, in] as the updates, on the device and in the dtype of those before."""
        like = next(self.buffers())
        self.sources = nn.ModuleList(Source(up.to(like, copy=True), down.to(like, copy=True), activation) for up, down in pairs)

    def adjust(self, found: dict[str, tuple[int, ...]]) -> None:
        for name, value in list(self.named_buffers()):
            if name in found and tuple(value.shape) != found[name]:
                path, _, leaf = name.rpartition(".")
                setattr(self.get_submodule(path), leaf, value.new_empty(found[name]))


class Fixed(Gated):
    """A sum whose gates are constants and whose updates have no curve: W + Σ_k diag(g_k) U_k D_k."""

    mergeable = True

    @torch.no_grad()
    def merged(self, weight: Tensor, bias: Tensor | None) -> Dense:
        total = weight.float()
        gate: Any = self.gate
        for share, source in zip(gate.constants(), cast(Iterable[Product], self.sources), strict=True):
            up, down = source.factors()
            total = total + centred((share.to(up).view(-1, 1) * up) @ down, weight)
        return total.to(weight.dtype), bias


class Scales(nn.Module):
    """One number for each source and channel [sources, out], or each source [sources, 1]; some are zeroed while training."""

    def __init__(self, sources: int, width: int, spread: float = 1e-3, dropout: float = 0.0):
        super().__init__()
        self.scales = nn.Parameter(2 / max(sources, 1) + spread * torch.randn(sources, width))
        self.dropout = nn.Dropout(dropout)

    def forward(self) -> Tensor:
        return self.dropout(self.scales)


class Constant(nn.Module):
    """Gates that are scales of a layer's own, or the shared ones."""

    shared: Any

    def __init__(self, own: Scales | None):
        super().__init__()
        self.own = own

    def forward(self, own: Tensor, changes: Sequence[Tensor]) -> Iterable[Tensor]:
        return self.scales()

    def constants(self) -> Tensor:
        """The gates as they are, none zeroed."""
        return self.scales.scales

    @property
    def scales(self) -> Scales:
        """The layer's own, or the shared ones."""
        return self.shared if self.own is None else self.own


class Activated(nn.Module):
    """σ(LN(y) w_y + LN(v) w_v + LN(y) LN(v) w_b + c) · w_o of a layer's outputs y and of what a source gives, v; all w, c [out]."""

    def __init__(self, width: int, open: float = 3.0):
        super().__init__()
        self.of_layer, self.of_source, self.of_both = (nn.Parameter(torch.zeros(width)) for _ in range(3))
        self.shift, self.out = nn.Parameter(torch.full((width,), open)), nn.Parameter(torch.ones(width))

    def forward(self, own: Tensor, changes: Sequence[Tensor]) -> list[Tensor]:
        def normed(values: Tensor) -> Tensor:
            return F.layer_norm(values.to(self.out.dtype), self.out.shape)

        y = normed(own)
        scores = [y * self.of_layer + v * self.of_source + y * v * self.of_both + self.shift for v in map(normed, changes)]
        return [self.out * torch.sigmoid(score) for score in scores]


class Quality(nn.Module):
    """How good each sample of the batch is, α [batch] in 0 to 1, while a scorer is at work (`scored`); otherwise one number."""

    def __init__(self, fixed: float, threshold: float):
        super().__init__()
        self.fixed, self.threshold = fixed, threshold
        self.given: Tensor | None = None

    def judge(self, quality: Tensor) -> None:
        """α = 0.5 + (q - threshold) within 0 and 1, for q [batch]."""
        self.given = (0.5 + quality - self.threshold).clamp(0, 1)


class Opposed(nn.Module):
    """Gates 1 - α and α of two sources, by the quality of each sample."""

    shared: Quality

    def forward(self, own: Tensor, changes: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        given = self.shared.given
        alpha = own.new_tensor([self.shared.fixed]) if given is None else given.to(own)
        alpha = by_sample(alpha, own)
        return 1 - alpha, alpha

    def constants(self) -> tuple[Tensor, Tensor]:
        if self.shared.given is not None:
            raise ValueError("A scorer is at work, so that each sample has another weight. Put the adapter into the weights without it.")
        return torch.tensor(1 - self.shared.fixed), torch.tensor(self.shared.fixed)


class Prompt(nn.Module):
    """What a prompt says of each channel: ρ = clamp(Σ_n a_n S_n, 0, most) with S = W₂ gelu(W₁ H) and a = softmax(w · S + c).

    ρ is 1 or near it at first. Without a prompt (`prompted`) it is that of one token whose hidden state is zero.
    """

    def __init__(self, width: int, most: float):
        super().__init__()
        inner = max(1, width // 4)
        self.down, self.up, self.score = nn.Linear(width, inner), nn.Linear(inner, width), nn.Linear(width, 1)
        nn.init.ones_(self.up.bias)
        nn.init.zeros_(self.down.bias)
        self.most = most
        self.given: Tensor | None = None

    def forward(self, states: Tensor, mask: Tensor | None = None) -> Tensor:
        """ρ [batch, width] of hidden states [batch, tokens, width]; mask [batch, tokens] is 0 where there is no token.

        Raises:
            ModelError: the hidden states have another width.
        """
        width = self.score.in_features
        if states.shape[-1] != width:
            raise ModelError(f"The prompt's hidden states have {states.shape[-1]} channels, and the adapter knows {width}.")
        made = self.up(F.gelu(self.down(states.to(self.up.weight.dtype))))
        scores = self.score(made)
        if mask is not None:
            scores = scores.masked_fill(mask.unsqueeze(-1) == 0, -torch.inf)
        return (scores.softmax(1) * made).sum(1).clamp(0, self.most)


class Prompted(nn.Module):
    """One gate ρ, of as many channels as the layer gives: the first where these are fewer, and from the first again where they are more."""

    shared: Prompt

    def forward(self, own: Tensor, changes: Sequence[Tensor]) -> list[Tensor]:
        scale = self.shared.given
        if scale is None:
            scale = self.shared(next(self.shared.parameters()).new_zeros(1, 1, self.shared.score.in_features))
        channels = torch.arange(own.shape[-1], device=own.device) % scale.shape[-1]
        return [by_sample(scale[:, channels], own)]


def by_sample(values: Tensor, outputs: Tensor) -> Tensor:
    """Values [batch] or [batch, out] to multiply with outputs [rows, ..., out], in which each sample may have several rows.

    Raises:
        ModelError: so many rows are not of so many samples.
    """
    rows, samples = len(outputs), len(values)
    if rows % samples:
        raise ModelError(f"A layer gives {rows} rows for {samples} samples. Give one value for each sample of the batch.")
    values = values.repeat_interleave(rows // samples, 0)
    return values.view(rows, *[1] * (outputs.ndim - 2), values.shape[1] if values.ndim > 1 else 1)


@contextlib.contextmanager
def scored(model: Any, scorer: Callable[[Any], Tensor]) -> Iterator[None]:
    """Inside, a scorer says for each batch how good its samples are, and adapters that go by quality hear it.

    scorer: gives for the model's named inputs, a dict, or its only unnamed one, the quality of each sample [batch], 0 to 1.
    """
    found = [module for module in model.modules() if isinstance(module, Quality)]

    @torch.no_grad()
    def listen(_: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        quality = torch.as_tensor(scorer(named or given[0]))
        for module in found:
            module.judge(quality)

    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    handle = base.register_forward_pre_hook(listen, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
        for module in found:
            module.given = None


@contextlib.contextmanager
def prompted(model: Any, **prompt: Tensor) -> Iterator[None]:
    """Inside, adapters that go by the prompt scale their updates by it, also while many tokens are generated.

    prompt: the named inputs of the model under the adapters, with `attention_mask` where rows have unequal lengths. It sees them once,
    without its adapters.
    """
    with model.disable_adapter(), torch.no_grad():
        states = model.get_base_model().base_model(**prompt).last_hidden_state
    found = [module for module in model.modules() if isinstance(module, Prompt)]
    for module in found:
        module.given = module(states, prompt.get("attention_mask"))
    try:
        yield
    finally:
        for module in found:
            module.given = None

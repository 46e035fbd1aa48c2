"""Caches of keys and values that hold fewer bits, for `generate(past_key_values=...)` of transformers.

Each layer stores packed integers or 8-bit floats; what attention reads of one layer is made dense while that layer computes.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedConfig
from transformers.cache_utils import DynamicCache, DynamicLayer

from modelwright.core.errors import ModelError, SettingError
from modelwright.maths.grids import to_float8
from modelwright.maths.ranges import cut, filled
from modelwright.maths.rounding import smallest_scale
from modelwright.maths.scales import LARGEST

WHOLE = 16  # bits that mean: leave it as it is


def kivi_cache(config: PreTrainedConfig, bits: int = 2, group: int = 32, residual: int = 128) -> StoredCache:
    """A cache of 1 to 8 bits: keys rounded by channel over `group` tokens, values by token over `group` channels.

    config: that of the model. residual: the newest tokens, a multiple of `group`, whose keys and values stay as they are: of values
    exactly so many, of keys fewer than that, as those are rounded `residual` at a time. bits 16 rounds nothing.

    Only layers that attend to everything are rounded; those with a window keep their own small caches. Pad tokens on the left take
    part in the ranges of keys. Raises SettingError for numbers that do not fit, ModelError when no layer has such a cache, or, at the
    first token, when the group does not divide a head's channels.
    Source: Liu et al. 2024, arXiv:2402.02750, section 3.3 and algorithm 1.
    """
    if bits not in (*range(1, 9), WHOLE) or group < 1 or bits * group % 8:
        raise SettingError(f"bits={bits} and group={group} were asked for. Give 1 to 8 bits, or 16, and a group that fills whole bytes.")
    if residual < group or residual % group:
        raise SettingError(f"residual={residual} is no multiple of group={group}. Give one that is.")
    return StoredCache(config, lambda: KiviLayer(bits, group, residual))


def fp8_cache(config: PreTrainedConfig, scope: Literal["head", "tensor", "token"] = "head") -> StoredCache:
    """A cache of 8-bit floats (E4M3) with scales max|x| / 448 of each layer's heads, of the whole, or of each token in each head.

    config: that of the model. The scales of `head` and `tensor` are those of the first tokens that come in, the prompt; what is
    larger later is cut off at 448 times them. `token` has no such limit, and stores a scale in the model's dtype for each head and
    token. Raises SettingError for another scope, ModelError when no layer attends to everything.
    """
    if scope not in ("head", "tensor", "token"):
        raise SettingError(f"scope={scope!r} was asked for. Give head, tensor or token.")
    return StoredCache(config, lambda: Float8Layer(scope))


class StoredCache(DynamicCache):
    """The cache that transformers would make, with these layers wherever all tokens are kept."""

    def __init__(self, config: PreTrainedConfig, make: Callable[[], StoredLayer]):
        super().__init__(config=config)
        self.layers = [make() if type(layer) is DynamicLayer else layer for layer in self.layers]
        if not any(isinstance(layer, StoredLayer) for layer in self.layers):
            found = ", ".join(sorted({type(layer).__name__ for layer in self.layers}))
            raise ModelError(f"A cache of fewer bits needs layers that attend to all tokens; this model's have {found}. Leave it out.")

    def stored_bytes(self) -> int:
        """The bytes of all tensors that the cache holds: codes, scales, ranges and what is not rounded."""
        return sum(value.nbytes for layer in self.layers for value in tree_leaves(vars(layer)) if isinstance(value, Tensor))


class StoredLayer(DynamicLayer):
    """A layer's cache: `keys` and `values` [batch, heads, tokens, channels] hold the newest tokens as they are, `stored` the others."""

    is_croppable = False
    keys: Any  # tensors from the first call on
    values: Any

    def __init__(self) -> None:
        super().__init__()
        self.stored: dict[str, Tensor] = {}  # the batch is the first dimension of each
        self.seen = 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Take new tokens in; returns all keys and values for attention, where tokens are rounded from the next call on."""
        if not self.is_initialized:
            self.begin(key_states, value_states)
            self.lazy_initialization(key_states, value_states)
        self.keys, self.values = _joined(self.keys, key_states), _joined(self.values, value_states)
        keys, values = self.old()
        whole = _joined(keys, self.keys), _joined(values, self.values)
        self.seen += key_states.shape[-2]
        self.settle()
        return whole

    def begin(self, keys: Tensor, values: Tensor) -> None:
        """Look at the first tokens. Raises ModelError when they cannot be stored."""

    @abstractmethod
    def old(self) -> tuple[Tensor | None, Tensor | None]:
        """The stored keys and values, dense."""

    @abstractmethod
    def settle(self) -> None:
        """Move tokens from `keys` and `values` into `stored`."""

    def add(self, dimension: int, **more: Tensor) -> None:
        """Append to the stored tensors of these names."""
        for name, value in more.items():
            held = self.stored.get(name)
            self.stored[name] = value if held is None else torch.cat([held, value], dimension)

    def get_seq_length(self) -> int:
        return self.seen

    def _every(self, function: Callable[[Tensor], Tensor]) -> None:
        if self.is_initialized:
            self.keys, self.values = function(self.keys), function(self.values)
            self.stored = {name: function(value) for name, value in self.stored.items()}

    def offload(self) -> None:
        self._every(lambda value: value.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        self._every(lambda value: value.to(self.device, non_blocking=True))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._every(lambda value: value.index_select(0, beam_idx.to(value.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._every(lambda value: value.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._every(lambda value: value[indices])

    def reset(self) -> None:
        super().reset()
        self.stored, self.seen = {}, 0

    def crop(self, tokens_to_remove: int) -> None:
        """Raises ModelError: tokens that were rounded cannot be had back."""
        if tokens_to_remove:
            raise ModelError(f"{-tokens_to_remove} tokens should go from a cache of fewer bits, which cannot. Use transformers' own cache.")


class KiviLayer(StoredLayer):
    """`stored`: codes uint8 of keys [batch, heads, channels, tokens · bits / 8] and of values [batch, heads, tokens, channels ·
    bits / 8], each with a scale and a least value for `group` of the last dimension."""

    def __init__(self, bits: int, group: int, residual: int):
        super().__init__()
        self.bits, self.group, self.residual = bits, group, residual

    def begin(self, keys: Tensor, values: Tensor) -> None:
        if self.bits != WHOLE and values.shape[-1] % self.group:
            raise ModelError(f"group={self.group} does not divide the {values.shape[-1]} channels of a head. Give a group that does.")

    def old(self) -> tuple[Tensor | None, Tensor | None]:
        keys = self._filled("key")
        return None if keys is None else keys.transpose(-1, -2), self._filled("value")

    def settle(self) -> None:
        if self.bits == WHOLE:
            return
        count = self.keys.shape[-2] // self.residual * self.residual
        if count:
            codes, scale, low = cut(self.keys[..., :count, :].transpose(-1, -2), self.bits, self.group)
            self.add(-1, key=codes, key_scale=scale, key_low=low)
            self.keys = self.keys[..., count:, :].clone()
        count = self.values.shape[-2] - self.residual
        if count > 0:
            codes, scale, low = cut(self.values[..., :count, :], self.bits, self.group)
            self.add(-2, value=codes, value_scale=scale, value_low=low)
            self.values = self.values[..., count:, :].clone()

    def _filled(self, name: str) -> Tensor | None:
        if name not in self.stored:
            return None
        return filled(self.stored[name], self.stored[f"{name}_scale"], self.stored[f"{name}_low"], self.bits)


class Float8Layer(StoredLayer):
    """`stored`: key and value, E4M3 [batch, heads, tokens, channels]; with scope "token" their scales [batch, heads, tokens, 1]."""

    def __init__(self, scope: str):
        super().__init__()
        self.scope = scope
        self.scales: dict[str, Tensor] = {}  # [1, heads or 1, 1, 1], the same for the whole batch

    def begin(self, keys: Tensor, values: Tensor) -> None:
        if self.scope != "token":
            over = (0, 2, 3) if self.scope == "head" else (0, 1, 2, 3)
            self.scales = {name: _scale(value, over) for name, value in (("key", keys), ("value", values))}

    def old(self) -> tuple[Tensor | None, Tensor | None]:
        return self._dense("key"), self._dense("value")

    def settle(self) -> None:
        for name, value in (("key", self.keys), ("value", self.values)):
            own = {} if self.scales else {f"{name}_scale": _scale(value, (3,)).to(value.dtype)}
            scale = self.scales.get(name, own.get(f"{name}_scale"))
            assert scale is not None
            self.add(-2, **{name: to_float8(value.float() / scale.float())}, **own)
        self.keys, self.values = (value[..., :0, :].clone() for value in (self.keys, self.values))

    def _dense(self, name: str) -> Tensor | None:
        if name not in self.stored:
            return None
        scale = self.scales[name] if self.scales else self.stored[f"{name}_scale"]
        return (self.stored[name].float() * scale.float()).to(self.dtype)

    def reset(self) -> None:
        super().reset()
        self.scales = {}


def _joined(old: Tensor | None, new: Tensor) -> Tensor:
    """The tokens of both."""
    return new if old is None or not old.numel() else torch.cat([old, new], -2)


def _scale(values: Tensor, over: tuple[int, ...]) -> Tensor:
    """max|x| / 448 over some dimensions, which stay as 1; float32, and never 0."""
    return (values.abs().amax(over, keepdim=True).float() / LARGEST).clamp_(min=smallest_scale(values.dtype))

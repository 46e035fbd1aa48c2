"""A linear layer of packed integers, stored as compressed-tensors stores one (format pack-quantized)."""

from __future__ import annotations

from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from modelwright.blocks._stored import Stored, parameter
from modelwright.maths.packed_products import product
from modelwright.maths.rounding import decode, pack, packed_words, rounded_rows, unpack


class PackedLinear(Stored):
    """y = x Ŵᵀ + b with Ŵ = (code - zero) · scale, the codes in a dense stream of 1 to 8 bits each.

    Stored: weight_packed int32 [out, ceil(in · bits / 32)], weight_scale [out, groups], weight_shape int64 [2], when asymmetric
    weight_zero_point int32 [ceil(out · bits / 32), groups], or floats [out, groups] with zeros "float", and bias [out]. Ŵ is made
    anew for many inputs; a few are multiplied by the codes as they are (`maths.packed_products`).
    group: columns that share a scale, a divisor of in_features; None is the whole row. inputs: bits to which each row of the inputs is
    rounded with a scale of its own; None leaves them. threshold: columns in which an input reaches this size are not rounded, but
    multiplied as they are (LLM.int8()); 0 rounds all, in the steps that compressed-tensors takes, so that others compute the same.
    """

    kind = "packed"
    weight_packed: Tensor
    weight_scale: Tensor
    weight_shape: Tensor
    weight_zero_point: Tensor | None
    bias: nn.Parameter | None

    def __init__(
        self,
        out_features: int,
        in_features: int,
        *,
        bits: int,
        group: int | None = None,
        symmetric: bool = True,
        zeros: Literal["packed", "float"] = "packed",
        inputs: int | None = None,
        threshold: float = 0.0,
        bias: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ):
        super().__init__()
        self.out_features, self.in_features, self.bits, self.group = out_features, in_features, bits, group
        self.inputs, self.threshold, self.zeros, self.rounds_inputs = inputs, threshold, zeros, inputs is not None
        groups = in_features // (group or in_features)
        sizes = [(out_features, packed_words(in_features, bits)), (packed_words(out_features, bits), groups)]
        codes, whole = (torch.empty(size, dtype=torch.int32, device=device) for size in sizes)
        self.register_buffer("weight_packed", codes)
        self.register_buffer("weight_scale", torch.empty(out_features, groups, dtype=dtype, device=device))
        shifts = torch.empty(out_features, groups, dtype=dtype, device=device) if zeros == "float" else whole
        self.register_buffer("weight_zero_point", None if symmetric else shifts)
        self.register_buffer("weight_shape", torch.tensor([out_features, in_features], device=device))
        self.bias = parameter(torch.empty(out_features, dtype=dtype, device=device) if bias else None)

    @classmethod
    def from_codes(
        cls, codes: Tensor, scale: Tensor, zero: Tensor | None, bits: int, bias: Tensor | None = None,
        inputs: int | None = None, threshold: float = 0.0,
    ) -> Self:  # fmt: skip
        """Store codes int8 [out, in], scale [out, groups] and zero [out, groups], int8 or float, or None.

        They are what `maths.rounding` makes: codes and zeros signed, columns in consecutive groups of equal size.
        """
        layer = cls(
            out_features=codes.shape[0],
            in_features=codes.shape[1],
            bits=bits,
            group=None if scale.shape[1] == 1 else codes.shape[1] // scale.shape[1],
            zeros="float" if zero is not None and zero.is_floating_point() else "packed",
            inputs=inputs,
            threshold=threshold,
            dtype=scale.dtype,
            device=codes.device,
        )
        layer.weight_packed = pack(codes, bits)
        layer.weight_scale = scale.detach().clone()
        if zero is not None:
            whole = layer.zeros == "packed"
            layer.weight_zero_point = pack(zero.t().contiguous(), bits).t().contiguous() if whole else zero.detach().clone()
        layer.bias = parameter(bias)
        return layer

    def codes(self) -> Tensor:
        """The signed codes, int8 [out, in]."""
        return unpack(self.weight_packed, self.bits, self.in_features)

    def zero(self) -> Tensor | None:
        """The signed zero points, int8 or float [out, groups], or None on a symmetric grid."""
        if self.weight_zero_point is None or self.zeros == "float":
            return self.weight_zero_point
        return unpack(self.weight_zero_point.t(), self.bits, self.out_features).t()

    def dense(self) -> Tensor:
        """Ŵ [out, in] in the scales' dtype."""
        return decode(self.codes(), self.weight_scale, self.zero())

    def forward(self, inputs: Tensor) -> Tensor:
        """inputs [..., in] → [..., out], in the inputs' dtype."""
        if self.inputs is None:
            found = product(inputs, self.weight_packed, self.bits, self.weight_scale, self.weight_zero_point)
            if found is None:
                return self.linear(inputs)
            return found if self.bias is None else found + self.bias
        found = self._of_rounded(inputs.reshape(-1, self.in_features)).to(inputs.dtype).view(*inputs.shape[:-1], self.out_features)
        return found if self.bias is None else found + self.bias

    def _of_rounded(self, x: Tensor) -> Tensor:
        """The products of rounded inputs [rows, in], and of those that are too large to round; float32 [rows, out]."""
        assert self.inputs is not None
        large = (x.abs() >= self.threshold).any(0).nonzero()[:, 0] if self.threshold else x.new_empty(0, dtype=torch.long)
        codes, step = rounded_rows(x.masked_fill(x.abs() >= self.threshold, 0) if len(large) else x, self.inputs, even=self.threshold > 0)
        codes[:, large] = 0
        if self.bits == 8 and self.group is None and self.weight_zero_point is None and x.device.type == "cpu":  # others ask for sizes
            whole = torch._int_mm(codes, self.codes().T).float() * step * self.weight_scale.float().T
        else:
            whole = nn.functional.linear(codes.float() * step, self.dense().float())
        return whole + nn.functional.linear(x[:, large].float(), self.dense()[:, large].float()) if len(large) else whole

    def scheme(self) -> dict[str, Any] | None:
        if self.weight_zero_point is not None or self.threshold:
            return None  # zero points have a name, but transformers cannot load them
        weights = {"num_bits": self.bits, "type": "int", "symmetric": True, "dynamic": False}
        weights |= {"strategy": "group", "group_size": self.group} if self.group else {"strategy": "channel"}
        inputs = {"num_bits": self.inputs, "type": "int", "symmetric": True, "dynamic": True, "strategy": "token"}
        return {"format": "pack-quantized", "weights": weights} | ({"input_activations": inputs} if self.inputs else {})

    def why_not(self, old: nn.Module) -> str:
        if not isinstance(old, nn.Embedding):
            return super().why_not(old)
        plain = self.weight_zero_point is None and self.inputs is None
        return "" if plain else "is an embedding, of whose packed forms there are symmetric packed integers alone"

    def standing_for(self, old: nn.Module) -> Stored:
        """The layer itself, or an embedding of its integers."""
        if not isinstance(old, nn.Embedding):
            return super().standing_for(old)
        from modelwright.blocks.embedding import PackedEmbedding

        return PackedEmbedding.from_linear(self, multiplier=float(getattr(old, "embed_scale", 1.0))).standing_for(old)

    def settings(self) -> dict[str, Any]:
        """What makes such a layer beside its sizes, as a JSON object."""
        extra: dict[str, Any] = {"zeros": "float"} if self.zeros == "float" else {}
        extra |= {"inputs": self.inputs, "threshold": self.threshold} if self.inputs else {}
        return {"bits": self.bits, "group": self.group, "symmetric": self.weight_zero_point is None} | extra

"""A convolution whose kernel is mixed anew for each input, of kernels that layers which are gone have left.

CondConv, Yang et al. 2019, arXiv:1904.04971, with inherited kernels as in A-SDM (CLME, Zhu et al. 2023, arXiv:2312.15516).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from modelwright.blocks._stored import Described
from modelwright.core.errors import ModelError


class ConditionalConv2d(Described):
    """Σₖ aₖ(x) Wₖ as the kernel for x: weight [kernels, out, in, height, width], a = softmax or sigmoid of a linear of x's mean.

    The work is that of one convolution, beside the mixing.
    """

    kind = "conditional"

    def __init__(self, *, in_channels: int, out_channels: int, size: Sequence[int], kernels: int, stride: Sequence[int] = (1, 1),
                 padding: Sequence[int] = (0, 0), dilation: Sequence[int] = (1, 1), gate: Literal["softmax", "sigmoid"] = "softmax",
                 bias: bool = True, dtype: torch.dtype | None = None, device: torch.device | str | None = None):  # fmt: skip
        super().__init__()
        if gate not in ("softmax", "sigmoid"):
            raise ModelError(f"The gate of a conditional convolution is softmax or sigmoid; got {gate!r}.")
        self.in_channels, self.out_channels, self.kernels, self.gate = in_channels, out_channels, kernels, gate
        self.size, self.stride, self.padding, self.dilation = (list(each) for each in (size, stride, padding, dilation))
        self.weight = nn.Parameter(torch.empty(kernels, out_channels, in_channels, *size, dtype=dtype, device=device))
        self.bias = nn.Parameter(torch.empty(kernels, out_channels, dtype=dtype, device=device)) if bias else None
        self.mix = nn.Linear(in_channels, kernels, dtype=dtype, device=device)

    @classmethod
    def inheriting(
        cls, own: nn.Conv2d, others: Sequence[nn.Conv2d], gate: Literal["softmax", "sigmoid"] = "softmax", share: float = 0.9
    ) -> ConditionalConv2d:
        """In the place of `own`, with its kernel and those of `others`, which are gone; at first own has `share`, the others the rest.

        Raises:
            ModelError: kernels have other shapes, own is grouped or padded with a word or otherwise than with zeros, or the
                share is not between 0 and 1.
        """
        wrong = [tuple(other.weight.shape) for other in others if other.weight.shape != own.weight.shape]
        if wrong:
            raise ModelError(f"Kernels of one shape can be mixed: own is {tuple(own.weight.shape)}, another {wrong[0]}. Leave it out.")
        if own.groups > 1 or isinstance(own.padding, str) or own.padding_mode != "zeros":
            raise ModelError("A conditional convolution stands for one with one group, padded with a number of zeros. Leave this one.")
        if not 0 < share <= 1 or share == 1 and others:
            raise ModelError(f"Own kernel begins with a share above 0 and below 1; got {share}.")
        every = [own, *others]
        biases = [each.bias for each in every]
        made = cls(in_channels=own.in_channels, out_channels=own.out_channels, size=own.kernel_size, kernels=len(every), stride=own.stride,
                   padding=own.padding, dilation=own.dilation, gate=gate, bias=any(bias is not None for bias in biases),
                   dtype=own.weight.dtype, device=own.weight.device)  # fmt: skip
        with torch.no_grad():
            made.weight.copy_(torch.stack([each.weight for each in every]))
            if made.bias is not None:
                zeros = made.bias.new_zeros(own.out_channels)
                made.bias.copy_(torch.stack([zeros if bias is None else bias for bias in biases]))
            rest = max((1 - share) / max(len(others), 1), 1e-6)
            first = torch.tensor([min(share, 1 - 1e-6), *[rest] * len(others)])
            made.mix.weight.zero_()
            made.mix.bias.copy_(first.log() if gate == "softmax" else first.logit())
        return made

    def shares(self, x: Tensor) -> Tensor:
        """The shares of the kernels [rows, kernels] for x [rows, in, height, width]."""
        found = self.mix(x.mean((2, 3)))
        return found.softmax(1) if self.gate == "softmax" else found.sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        """x [rows, in, height, width] → [rows, out, ...]."""
        shares, rows = self.shares(x), len(x)
        kernel = torch.einsum("rk,koihw->roihw", shares, self.weight).flatten(0, 1)
        bias = None if self.bias is None else (shares @ self.bias).flatten()
        found = F.conv2d(x.flatten(0, 1)[None], kernel, bias, self.stride, self.padding, self.dilation, groups=rows)
        return found.view(rows, self.out_channels, *found.shape[2:])

    def describe(self) -> dict[str, Any]:
        """The kind, sizes and gate, as a JSON object."""
        sizes = {name: getattr(self, name) for name in ("in_channels", "out_channels", "size", "kernels", "stride", "padding", "dilation")}
        return {"kind": self.kind, **sizes, "gate": self.gate, "bias": self.bias is not None}

"""A Fourier layer: low frequencies are mixed by a complex weight, dense or stored as the parts of a tensor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from modelwright.blocks._stored import Described
from modelwright.maths.tensor_factors import Form, contract, ranks_for, shapes_of, spread, terms


class SpectralConv(Described):
    """y = F⁻¹(W · F x) on the lowest frequencies: rfft over space, W [in, out] for each, all others 0; plus a bias.

    Li et al. 2021, arXiv:2010.08895; weights as tensors, Kossaifi et al. 2023, arXiv:2310.00120, section 3. modes: how many
    frequencies of each side, the middle ones around 0; of the last side, which the real transform halves, modes // 2 + 1. A
    smaller grid uses the middle of the weight, so that a layer works at any resolution. layers: so many layers have one weight
    [layers, in, out, modes] and a bias each; `forward` is told which. form: None is dense.
    Stored: part_0, part_1, ... (one where dense), complex numbers as two real ones at the end; bias [layers, out].
    """

    kind = "spectral"
    bias: nn.Parameter | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        modes: Sequence[int],
        form: Literal["cp", "tucker", "tt"] | None = "tucker",
        keep: float = 0.1,
        layers: int = 1,
        bias: bool = True,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ):
        super().__init__()
        self.in_channels, self.out_channels, self.modes, self.layers = in_channels, out_channels, tuple(modes), layers
        self.form: Form | None = form
        self.keep = keep
        self.halved = (*self.modes[:-1], self.modes[-1] // 2 + 1)
        shared = (layers,) if layers > 1 else ()
        self.tensor_shape = (*shared, in_channels, out_channels, *self.halved)
        self.ranks = () if form is None else ranks_for(form, self.tensor_shape, keep)
        sizes = [self.tensor_shape] if form is None else shapes_of(form, self.tensor_shape, self.ranks)
        for n, size in enumerate(sizes):
            self.register_parameter(f"part_{n}", nn.Parameter(torch.empty(*size, 2, dtype=dtype, device=device)))
        self.bias = nn.Parameter(torch.zeros(layers, out_channels, dtype=dtype, device=device)) if bias else None
        if torch.device(device or "cpu").type != "meta":
            self.draw()

    @torch.no_grad()
    def draw(self, rng: torch.Generator | None = None) -> None:
        """Fill the weight with random numbers of the standard deviation √(2 / (in + out)), the parts so that W has it."""
        deviation = (2 / (self.in_channels + self.out_channels)) ** 0.5
        each = deviation if self.form is None else spread(self.form, self.tensor_shape, self.ranks, deviation)
        for part in self.parameters():
            if part is not self.bias:
                part.copy_(each * torch.randn(part.shape, generator=rng) / 2**0.5)

    @property
    def parts(self) -> list[Tensor]:
        """The weight, or its parts, as complex tensors."""
        held = [part for name, part in self.named_parameters() if name != "bias"]
        return [torch.view_as_complex((part if part.dtype == torch.float64 else part.float()).contiguous()) for part in held]

    def dense(self) -> Tensor:
        """W, complex [in, out, modes]; [layers, in, out, modes] where layers share it."""
        ways = "abcdefgh"[: len(self.tensor_shape)]
        return self.parts[0] if self.form is None else contract(terms(self.form, ways), self.parts, ways)

    def forward(self, inputs: Tensor, layer: int = 0) -> Tensor:
        """inputs [batch, in, side, ...] → [batch, out, side, ...]."""
        sides = tuple(inputs.shape[2:])
        axes = tuple(range(-len(sides), 0))
        real = inputs if inputs.dtype == torch.float64 else inputs.float()
        turns = [size // 2 for size in sides[:-1]] + [0]  # which put the frequency 0 in the middle
        states = torch.fft.rfftn(real, dim=axes, norm="forward").roll(turns, axes)
        held = [self.middle(n, size) for n, size in enumerate(sides)]
        low: Any = (..., *(grid for grid, _ in held))
        mixed = self.mixed(states[low], [modes for _, modes in held], layer)
        full = mixed.new_zeros(*mixed.shape[:2], *states.shape[2:])
        full[low] = mixed
        found = torch.fft.irfftn(full.roll([-turn for turn in turns], axes), s=sides, dim=axes, norm="forward").to(inputs.dtype)
        return found if self.bias is None else found + self.bias[layer].view(-1, *[1] * len(sides))

    def middle(self, side: int, size: int) -> tuple[slice, slice]:
        """The frequencies around 0 that both a side of this size and the weight have: their places in each."""
        modes, last = self.modes[side], side == len(self.modes) - 1
        if last:
            both = min(self.halved[-1], size // 2 + 1)
            return slice(both), slice(both)
        both = min(modes, size)
        grid, own = size // 2 - both // 2, modes // 2 - both // 2
        return slice(grid, grid + both), slice(own, own + both)

    def mixed(self, seen: Tensor, modes: Sequence[slice], layer: int) -> Tensor:
        """Frequencies [batch, in, modes] → [batch, out, modes], without the weight being made of its parts."""
        several = self.layers > 1
        cuts = [slice(layer, layer + 1)] * several + [slice(None), slice(None), *modes]
        space = "mnopq"[: len(modes)]
        ways = [*"l" * several, "i", "o", *space]
        if self.form is None:
            letters, parts = ["".join(ways)], [self.parts[0][tuple(cuts)]]
        else:
            letters, parts = terms(self.form, ways), self.parts
            first = len(parts) - len(ways)  # a core has ranks alone
            for n, cut in enumerate(cuts):
                parts[first + n] = parts[first + n][(slice(None), cut) if self.form == "tt" else cut]
        return contract(["z" + "i" + space, *letters], [seen.to(parts[0].dtype), *parts], "z" + "o" + space)

    def describe(self) -> dict[str, Any]:
        """The kind, sizes and settings, as a JSON object."""
        return {
            "kind": self.kind,
            "in_channels": self.in_channels,
            "out_channels": self.out_channels,
            "modes": list(self.modes),
            "form": self.form,
            "keep": self.keep,
            "layers": self.layers,
            "bias": self.bias is not None,
        }

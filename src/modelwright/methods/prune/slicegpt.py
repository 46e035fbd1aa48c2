"""Turn the stream between the blocks to its principal directions, and take out those that carry least: SliceGPT.

Ashkboos, Croci, do Nascimento, Hoefler, Hensman 2024, arXiv:2401.15024, sections 3.1 and 3.2. Norms' weights go into the matrices
behind them. Q holds the eigenvectors of the sum of x xᵀ (damped) over what enters every norm; matrices that read the stream
become W Q, those that write Qᵀ W. The last channels then leave; norms average over fewer, so that their weights take √(D/D')
and their eps D/D' to give what they gave.
Differs: one Q serves all places, so that blocks need no matrices in their shortcuts and the result is a plain model of another
width; the paper has one for each place, which fits closer and needs layers of its own. A head tied to the embedding comes apart.
Models whose norms subtract a mean are left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from modelwright.anatomy._rotation import fold_norms, residual_norms, rotate_stream
from modelwright.anatomy.removal import remove_units
from modelwright.core.errors import SiteError
from modelwright.core.given import Batch
from modelwright.core.method import ModelMethod
from modelwright.core.model import Model, unwrapped
from modelwright.core.passage import Resident, real
from modelwright.core.progress import track
from modelwright.core.settings import fraction
from modelwright.methods.prune._channels import Narrower


@dataclass(frozen=True, kw_only=True)
class SliceGpt(Narrower, ModelMethod):
    """Make the model narrower: keep the directions of its hidden states that carry most; every matrix shrinks, no training."""

    status: ClassVar[str] = "checked"
    neutral = dict(keep=1.0)
    drops: ClassVar[frozenset[str]] = frozenset({"sparse"})
    fails = {"ties_survive": "the final norm goes into the head and not into the embedding"}

    damp: float = fraction(0.01)  # of the mean diagonal, added to the diagonal before eigenvectors are taken

    def model(self, model: Model, calibration: Sequence[Batch], notes: list[str]) -> Model:
        module = unwrapped(model.module)
        before, after = self.width(module)
        if after == before:
            return model
        moment = stream_moment(model, calibration)
        if not moment.isfinite().all():
            raise SiteError(f"{self.name()}: what enters a norm is NaN or infinite on the text. Use a wider dtype, or other text.")
        values, rotation = directions(moment, self.damp)
        fold_norms(module)
        rotate_stream(module, rotation)
        share = float(values[:after].sum() / values.sum())
        notes.append(f"{self.name()}: {after} of {before} directions stay, with {share:.4f} of the hidden states' energy")
        self.narrowed(module, range(after), notes)
        return model

    def planned(self, module: Any, donors: int) -> Any:
        before, after = self.width(module)
        if after < before:
            fold_norms(module)
            remove_units(module, "residual", range(after), plain=False)
        return module


@torch.no_grad()
def stream_moment(model: Model, calibration: Sequence[Batch]) -> Tensor:
    """The sum of x xᵀ [width, width] in float64, over all tokens x that enter a norm of the stream; padding does not count."""
    walk = Resident(model)
    total = torch.zeros((), dtype=torch.float64)
    mask: list[Tensor | None] = [None]

    def add(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        nonlocal total
        x = real(args[0], mask[0]).double()
        total = total + (x.T @ x).cpu()

    handles = [norm.register_forward_pre_hook(add) for _, norm in residual_norms(walk.module)]
    try:
        for batch in track(calibration, "hidden states"):
            mask[0] = batch.get("attention_mask")
            walk.forward(batch)
    finally:
        for handle in handles:
            handle.remove()
    return total


def directions(moment: Tensor, damp: float) -> tuple[Tensor, Tensor]:
    """The energy along each principal direction [width], greatest first, and the directions as columns [width, width]."""
    damped = moment + damp * moment.diagonal().mean() * torch.eye(len(moment), dtype=moment.dtype)
    _, vectors = torch.linalg.eigh(damped)
    vectors = vectors.flip(1)
    return (vectors * (moment @ vectors)).sum(0), vectors

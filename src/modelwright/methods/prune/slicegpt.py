"""Turn the stream between the blocks to its principal directions, and take out those that carry least: SliceGPT.

Ashkboos, Croci, do Nascimento, Hoefler, Hensman 2024, arXiv:2401.15024, sections 3.1 to 3.3. Norms' weights go into the matrices
behind them. Q holds the eigenvectors of the sum of x xᵀ (damped) over what enters a norm; matrices that read the stream become
W Q, those that write Qᵀ W, and the last channels leave. Norms average over fewer, so that their weights take √(D/D') and their
eps D/D' to give what they gave. With `rotation: each`, as in the paper, every norm has a Q of its own, from text that has run
through the part before it as it is once sliced; what goes around an attention or MLP is turned by Qᵀ Q', a matrix that each
stores, and before the head no channel leaves.
Differs: with `rotation: one`, the default, one Q serves all norms, which fits less closely and needs no matrices: the result is a
plain model of another width. With `each`, mixtures of experts lose channels before the head too. The directions that stay are not
turned at random among themselves, which would change no output. A head tied to the embedding comes apart. Models whose norms
subtract a mean are left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from modelwright.anatomy import anatomy_of
from modelwright.anatomy._rotation import fold_norms, residual_norms, rotate_stream
from modelwright.anatomy.removal import remove_units
from modelwright.blocks._joining import Ways, joining
from modelwright.blocks.shortcuts import turn_at_each_norm
from modelwright.core.errors import SiteError
from modelwright.core.given import Batch
from modelwright.core.method import ModelMethod
from modelwright.core.model import Model, unwrapped
from modelwright.core.passage import Resident, real
from modelwright.core.progress import track
from modelwright.core.settings import fraction
from modelwright.maths.directions import onto, principal
from modelwright.methods.prune._channels import Narrower
from modelwright.methods.prune._units import loads_otherwise


@dataclass(frozen=True, kw_only=True)
class SliceGpt(Narrower, ModelMethod):
    """Make the model narrower: keep the directions of its hidden states that carry most; every matrix shrinks, no training."""

    status: ClassVar[str] = "checked"
    neutral = dict(keep=1.0)
    drops: ClassVar[frozenset[str]] = frozenset({"sparse"})
    fails = {"ties_survive": "the final norm goes into the head and not into the embedding"}

    rotation: Literal["one", "each"] = "one"  # one basis for the whole stream; or one for each norm, and matrices between them
    damp: float = fraction(0.01)  # of the mean diagonal, added to the diagonal before eigenvectors are taken

    def model(self, model: Model, calibration: Sequence[Batch], notes: list[str]) -> Model:
        module = unwrapped(model.module)
        before, after = self.width(module)
        if after == before:
            return model
        if self.rotation == "each":
            bases, shares = self.bases(model, calibration)
            turn_at_each_norm(module, bases)
            energy = f"between {min(shares):.4f} and {max(shares):.4f}"
        else:
            values, rotation = self.principal(stream_moment(model, calibration))
            fold_norms(module)
            rotate_stream(module, rotation)
            energy = f"{float(values[:after].sum() / values.sum()):.4f}"
        notes.append(f"{self.name()}: {after} of {before} directions stay, with {energy} of the hidden states' energy")
        if self.rotation == "each":
            notes.append(loads_otherwise(self.name(), "each norm has a basis of its own, with matrices between them"))
        else:
            self.narrowed(module, range(after), notes)
        return model

    def principal(self, moment: Tensor) -> tuple[Tensor, Tensor]:
        """`maths.directions.principal` of a moment [width, width].

        Raises:
            SiteError: it is not finite.
        """
        if not moment.isfinite().all():
            raise SiteError(f"{self.name()}: what enters a norm is NaN or infinite on the text. Use a wider dtype, or other text.")
        return principal(moment, self.damp)

    def widths(self, module: nn.Module) -> list[int]:
        """How many channels stay before each norm; all do before the last, where the block before it can be wider behind than before."""
        before, after = self.width(module)
        ways = anatomy_of(module).ways(module)
        experts = any(site.depth == max(ways) and site.role.startswith("experts") for site in anatomy_of(module).sites(module))
        return [after] * sum(map(len, ways.values())) + [after if experts else before]

    @torch.no_grad()
    def bases(self, model: Model, calibration: Sequence[Batch]) -> tuple[list[Tensor], list[float]]:
        """For each norm the directions that stay [width, kept], and the share of the energy that they have."""
        walk = Resident(model)
        widths, found, shares = self.widths(walk.module), list[Tensor](), list[float]()

        def find(states: Iterable[Tensor]) -> None:
            values, vectors = self.principal(sum(map(outer, states, walk.masks), torch.zeros(())))
            kept = widths[len(found)]
            found.append(vectors[:, :kept])
            shares.append(float(values[:kept].sum() / values.sum()))

        walk.masks = [batch.get("attention_mask") for batch in calibration]
        walk.enter(calibration)
        for depth, ways in anatomy_of(walk.module).ways(walk.module).items():
            first = len(found)
            find(walk.states)
            walk.states = [onto(found[first], state) for state in walk.states]
            for number in range(1, len(ways)):
                find(self.run(walk, depth, ways[: number + 1], found[first + 1 :])[0])
            walk.states = self.run(walk, depth, ways, found[first + 1 :])[1]
        find(walk.states)
        return found, shares

    def run(self, walk: Resident, depth: int, ways: Ways, bases: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """What enters the norm of the last of these parts of a block, and what leaves the block, with the stream on bases in between."""
        entering: list[Tensor] = []

        def give(number: int, x: Tensor, part: Tensor) -> Tensor:
            if number == len(ways) - 1:
                entering.append(x)
            return onto(bases[number], x + part) - x if number < len(bases) else part

        with joining(walk.stack[depth], ways, give):
            leaving = list(walk.run_block(depth))
        return entering, leaving

    def planned(self, module: Any, donors: int) -> Any:
        before, after = self.width(module)
        if after < before and self.rotation == "each":
            turn_at_each_norm(module, [torch.eye(before, width) for width in self.widths(module)])
        elif after < before:
            fold_norms(module)
            remove_units(module, "residual", range(after), plain=False)
        return module


def outer(x: Tensor, mask: Tensor | None) -> Tensor:
    """The sum of x xᵀ [width, width] in float64 over tokens that are no padding."""
    tokens = real(x, mask).double()
    return (tokens.T @ tokens).cpu()


@torch.no_grad()
def stream_moment(model: Model, calibration: Sequence[Batch]) -> Tensor:
    """The sum of x xᵀ [width, width] in float64, over all tokens x that enter a norm of the stream; padding does not count."""
    walk = Resident(model)
    total = torch.zeros((), dtype=torch.float64)
    mask: list[Tensor | None] = [None]

    def add(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        nonlocal total
        total = total + outer(args[0], mask[0])

    handles = [norm.register_forward_pre_hook(add) for _, norm in residual_norms(walk.module)]
    try:
        for batch in track(calibration, "hidden states"):
            mask[0] = batch.get("attention_mask")
            walk.forward(batch)
    finally:
        for handle in handles:
            handle.remove()
    return total

"""Remove the experts that text needs least, by how routers weigh them and how large their outputs are: REAP.

Lasby, Lazarevich, Sinnadurai, Lie, Ioannou, Thangarasa 2025, arXiv:2510.13999. Over the tokens that are sent to an expert,
with gate g and output f: the mean of g·‖f‖ (`reap`), the mean of ‖f‖ (`norm`), the sum of g (`gate`), or their number
(`frequency`). On text of one task the last two keep what that task uses, as in Sarkar et al. 2024 (UNCURL, arXiv:2409.01483).
Routers lose the same rows, so that the gates of what stays sum to one again where they did.
With `merge`, each expert that goes is first averaged into the one that stays whose row of the router is most like its own.
Differs: UNCURL's own rule is not published; `gate` is the nearest to its abstract. Experts that see no token go first, by number.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from modelwright.anatomy import anatomy_of
from modelwright.anatomy._base import Units
from modelwright.blocks.experts import SplitExperts
from modelwright.core.given import Batch
from modelwright.core.model import Model
from modelwright.core.passage import Resident
from modelwright.core.settings import fraction
from modelwright.core.walk import split_experts
from modelwright.methods.prune._units import Kept, TextUnitPruner


@dataclass(frozen=True, kw_only=True)
class Reap(TextUnitPruner):
    """Take whole experts out of a mixture, those that change their tokens' outputs least; no training."""

    status: ClassVar[str] = "checked"
    neutral = dict(share=0.0)

    units: tuple[str, ...] = ("experts",)  # kinds that go: experts
    share: float = fraction(0.25)  # of the units that go, by what they cost; one of each stays
    measure: Literal["reap", "norm", "gate", "frequency"] = "reap"  # of an expert, over the tokens that are sent to it
    merge: bool = False  # what goes is averaged into the most similar expert that stays, each by its measure

    def problems(self) -> list[str]:
        return [] if self.units == ("experts",) else [f"units are experts; got {', '.join(self.units)}. Use prune.flap for others."]

    def look(self, model: Model, found: Sequence[Units], calibration: Sequence[Batch]) -> dict[str, Tensor]:
        """By the path of experts, the tokens, the sum of g, of ‖f‖ and of g·‖f‖ of each expert [4, count]."""
        walk, sums = Resident(model), {units.scope: torch.zeros(4, units.count, dtype=torch.float64) for units in found}
        with torch.no_grad(), split_experts(walk.module):
            for batch in calibration:
                mask = batch.get("attention_mask")
                real = torch.ones_like(batch["input_ids"]).bool().view(-1) if mask is None else mask.bool().view(-1)
                with contextlib.ExitStack() as hooks:
                    for path, total in sums.items():
                        hooks.enter_context(_counted(_experts(walk.module, path), total, real))
                    walk.forward(batch)
        return sums

    def scores(self, module: nn.Module, found: Sequence[Units], seen: dict[str, Tensor]) -> list[Tensor]:
        return [self.score(*seen[units.scope]) for units in found]

    def compensate(self, module: nn.Module, found: Sequence[Units], kept: Kept, seen: dict[str, Tensor]) -> str:
        for units, rows in zip(found, kept, strict=True):
            if self.merge and len(rows) < units.count:
                merge_into(module, units, rows, self.score(*seen[units.scope]))
        return ""

    def score(self, tokens: Tensor, gates: Tensor, norms: Tensor, weighed: Tensor) -> Tensor:
        """The measure of each expert [count]."""
        means = {"reap": weighed, "norm": norms}
        return means[self.measure] / tokens.clamp(min=1) if self.measure in means else {"gate": gates, "frequency": tokens}[self.measure]


def merge_into(module: nn.Module, units: Units, rows: Sequence[int], weights: Tensor) -> None:
    """Let each expert that stays, and its row of the router, be the weighted mean of its own and of those that go and are nearest to it.

    Nearest by the cosine of the router's rows. weights [count]: of each expert; where a group's are all 0, they count alike.
    """
    anatomy = anatomy_of(module)
    router = next(span for span in units.spans if (anatomy.role(span.name) or ("",))[0] == "router")
    choosing = module.get_parameter(router.name).movedim(router.dim, 0).flatten(1).float()
    nearest = torch.nn.functional.cosine_similarity(choosing[:, None], choosing[list(rows)][None], dim=-1).argmax(1).tolist()
    groups: dict[int, list[int]] = {row: [row] for row in rows}
    for expert in set(range(units.count)) - set(rows):
        groups[rows[nearest[expert]]].append(expert)
    for span in units.spans:
        values = module.get_parameter(span.name).data
        parts = values.narrow(span.dim, span.start, units.count * span.width).movedim(span.dim, 0).unflatten(0, (units.count, span.width))
        for row, members in groups.items():
            shares = weights[members].to(values.device)
            shares = shares / shares.sum() if shares.sum() > 0 else torch.full_like(shares, 1 / len(members))
            parts[row] = torch.tensordot(shares, parts[members].to(shares.dtype), 1).to(values.dtype)


def _experts(module: nn.Module, path: str) -> SplitExperts:
    """The experts within a block's mixture."""
    return next(child for child in module.get_submodule(path).modules() if isinstance(child, SplitExperts))


@contextlib.contextmanager
def _counted(experts: SplitExperts, total: Tensor, real: Tensor) -> Iterator[None]:
    """Add to the sums of experts what they do with the tokens that are no padding."""
    routed: list[Tensor] = []

    def remember(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        routed[:] = args[1:3]

    def hook(number: int) -> Any:
        def count(_: nn.Module, args: Any, out: Tensor) -> None:
            index, weights = routed
            token, place = torch.where(index == number)
            counts = real.to(out.device)[token]
            gate, norm = weights[token, place].double()[counts], out.double().norm(dim=-1)[counts]
            total[:, number] += torch.stack([counts.sum().double(), gate.sum(), norm.sum(), (gate * norm).sum()]).cpu()

        return count

    handles = [experts.register_forward_pre_hook(remember)]
    handles += [expert.register_forward_hook(hook(number)) for number, expert in enumerate(experts)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()

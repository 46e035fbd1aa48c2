"""Learn which blocks can go, take them out, and let groups of those that stay use the same weights: FoldGPT.

Liu et al. 2024, arXiv:2407.00928. Block l gives h + g (block(h) - h), with one gate g = φ² / (φ² + ε) for each block and all
weights frozen. The φ are learnt together on the text's next tokens plus `push` · |mean g - share that stays|, while ε falls
from 0.1 to 1e-3 and draws the gates apart; the blocks of the lowest g leave. Sharing is that of `share.depth`.
Differs: the paper's code is not published; φ = 1 at the start, the two ends of ε, its geometric fall, Adam for φ at a rate that
falls as √ε (the width of what lies between open and shut), and the sizes of `push` and `learning_rate` are ours. The cure
(norms or adapters trained towards the original) is a step of its own, such as `distill.recover`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from modelwright.anatomy import anatomy_of
from modelwright.anatomy.removal import remove_blocks
from modelwright.core.errors import DataError, LayoutError, ModelError, PlanError, SiteError
from modelwright.core.given import Batch
from modelwright.core.gradients import logits_of, next_tokens
from modelwright.core.model import Model
from modelwright.core.passage import Resident
from modelwright.core.progress import track
from modelwright.core.settings import count, number
from modelwright.maths.schedules import geometric

from ._mechanism import BlockSharer

EPSILON = (0.1, 1e-3)  # of the gates, first and last


@dataclass(frozen=True, kw_only=True)
class FoldGpt(BlockSharer):
    """Remove whole `blocks` by gates that are learnt jointly, then share: for blocks whose loss depends on which others are gone."""

    status: ClassVar[str] = "checked"
    causal: ClassVar[bool] = True
    neutral = dict(blocks=0, loops=1)
    small = dict(spare_first=0, spare_last=0, steps=3)

    blocks: int = count(1, low=0, unit="blocks")  # to remove
    steps: int = count(60)  # in which the gates are learnt, each on one batch of eight sequences
    learning_rate: float = number(0.05, low=0)  # of the gates, at the first step
    push: float = number(4.0, low=0)  # weight of the open gates' distance from the share that stays

    def model(self, model: Model, calibration: Sequence[Batch], notes: list[str]) -> Model:
        self.refuse_adapters(model.module)
        module = model.module
        depths, gone = self.fitting(module), list[int]()
        if self.blocks:
            gates = self.learnt(model, calibration)
            gone = sorted(gates.argsort()[: self.blocks].tolist())
            shown = ", ".join(f"{gate:.4f}" for gate in gates.tolist())
            notes.append(f"{self.name()}: blocks removed {gone} (from 0) of {depths}; gates of all blocks {shown}")
            if gates.mean() > 1 - self.blocks / depths + 0.1:
                notes.append(f"{self.name()}: the gates are still {gates.mean():.2f} open on the mean. Take more steps, or a larger push")
        groups = self.share(module, [depth for depth in range(depths) if depth not in gone])
        remove_blocks(module, gone)
        for group in groups:
            notes.append(f"{self.name()} shared the weights of blocks {group[0]} to {group[-1]} of those that stay")
        return model

    def fitting(self, module: nn.Module) -> int:
        """How many blocks there are, before any work.

        Raises:
            PlanError: too many are to go, or too few would be left to share.
            SiteError: there is no single row of them, or fewer than are to share have plain matrices.
        """
        stack = anatomy_of(module).blocks(module)
        if stack is None:
            raise LayoutError(f"{self.name()} removes whole blocks; this model has no single row of them.")
        depths = len(list(module.get_submodule(stack).children()))
        if self.blocks >= depths:
            raise PlanError(f"{self.name()}: {self.blocks} blocks are to go, and there are {depths}. Keep one or more.")
        shared = sum(map(len, self.groups(depths - self.blocks)))
        stored = [fault for depth in range(depths) if (fault := self.stored(module, f"{stack}.{depth}"))]
        if depths - len(stored) < shared:
            raise SiteError(stored[0])
        return depths

    def learnt(self, model: Model, calibration: Sequence[Batch]) -> Tensor:
        """The gates [blocks] at the end, by φ learnt on the text."""
        walk = Resident(model)
        if not calibration or not all((next_tokens(batch, torch.device("cpu")) >= 0).any() for batch in calibration):
            raise DataError(f"{self.name()} was given no token that follows another. Give it text of two tokens or more.")
        phi = nn.Parameter(torch.ones(walk.depths))
        optimizer, stays = torch.optim.Adam([phi]), 1 - self.blocks / walk.depths
        before = {value: value.requires_grad for value in walk.module.parameters()}
        walk.module.requires_grad_(False)
        try:
            for step in track(range(self.steps), f"{self.name()}: gates"):
                batch, epsilon = calibration[step % len(calibration)], geometric(*EPSILON, step / max(self.steps - 1, 1))
                gates = polarised(phi, epsilon)
                with gated(walk.stack, gates):
                    logits = logits_of(walk.forward(batch))
                text = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), next_tokens(batch, logits.device).flatten())
                loss = text + self.push * (gates.mean() - stays).abs()
                if not loss.isfinite():
                    raise ModelError(
                        f"{self.name()}: the loss on the text is {loss.item()}. Use a wider dtype, other text, or sound weights."
                    )
                optimizer.zero_grad()
                loss.backward()
                optimizer.param_groups[0]["lr"] = self.learning_rate * (epsilon / EPSILON[0]) ** 0.5
                optimizer.step()
        finally:
            for value, kept in before.items():
                value.requires_grad_(kept)
        return polarised(phi.detach(), EPSILON[1])

    def planned(self, module: Any, donors: int) -> Any:
        self.refuse_adapters(module)
        depths = self.fitting(module)
        remove_blocks(module, range(depths - self.blocks, depths))
        return super().planned(module, donors)


def polarised(phi: Tensor, epsilon: float) -> Tensor:
    """φ² / (φ² + ε): between 0 and 1, and nearer to either the smaller ε is."""
    return phi.square() / (phi.square() + epsilon)


@contextlib.contextmanager
def gated(blocks: Iterable[nn.Module], gates: Tensor) -> Iterator[None]:
    """Let each block give h + g (block(h) - h), exactly block(h) where its gate is 1 and h where it is 0; gates [blocks]."""

    def hook(gate: Tensor) -> Any:
        def give(_: nn.Module, args: Any, kwargs: Any, out: Any) -> Any:
            before, after = args[0] if args else kwargs["hidden_states"], out[0] if isinstance(out, tuple) else out
            mixed = torch.lerp(before, after, gate.to(after))
            return (mixed, *out[1:]) if isinstance(out, tuple) else mixed

        return give

    handles = [block.register_forward_hook(hook(gate), with_kwargs=True) for block, gate in zip(blocks, gates, strict=True)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()

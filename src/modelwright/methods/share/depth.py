"""Let consecutive blocks use the same weights: recursion in depth.

Shen, Liu, Xing 2022, arXiv:2111.05297 (SReT: each block of a vision transformer applied twice). Liu et al. 2024, arXiv:2407.00928
(groups of a language model's blocks with the weights of one member, each with norms of its own). Of the first paper each use of a
shared block may also have of its own: scalars c, in x ← c x + c′ attn(norm(x)) and the same with the MLP (`residual_scales`); a
small MLP behind it, y ← c y + c′ MLP(norm(y)) (`projection`); and attention within groups of tokens (`slices`), consecutive ones
in the first use, and in further ones (`slices_again`) those of a random order, which is undone afterwards.
Differs: for trained models, so that the shared weights begin as those of the first or last block of a group, or as the mean, and
projections add zeros at first. The random order is drawn once for each use and not at each call. Where groups do not divide the
tokens, the first ones have one more; a class token is a token like the others. The paper's stem, pooling between stages and
distillation belong to a network of its own and are left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from modelwright.anatomy import anatomy_of
from modelwright.anatomy._rotation import residual_norms
from modelwright.blocks.recursion import Recursion
from modelwright.blocks.sliced_attention import SlicedAttention
from modelwright.core.errors import SiteError
from modelwright.core.model import Model
from modelwright.core.settings import count, number

from ._mechanism import BlockSharer


@dataclass(frozen=True, kw_only=True)
class Depth(BlockSharer):
    """Store one block for every `loops` consecutive ones; each keeps its norms. Fewer bytes, the same FLOPs; train afterwards."""

    status: ClassVar[str] = "checked"
    neutral = dict(loops=1)
    small = dict(spare_last=0)

    residual_scales: bool = False  # learnable scalars on the stream and on what joins it, 1 at first, for each use of a shared block
    projection: float = number(0.0, low=0)  # inner width of an MLP behind each use, of the stream's width; 0 for none
    slices: int = count(1, unit="groups")  # of tokens, within which the first use of a shared block attends; 1 for all tokens
    slices_again: int = count(1, unit="groups")  # of tokens in a random order, within which its further uses attend

    def problems(self) -> list[str]:
        own = self.residual_scales or self.projection or self.slices > 1 or self.slices_again > 1
        dense = "store: dense writes a plain model, which has no scales, projections or slices. Leave them out, or store: shared."
        return super().problems() + [dense] * bool(own and self.store == "dense")

    def model(self, model: Model, rng: torch.Generator, notes: list[str]) -> Model:
        groups = self.recur(model.module, rng)
        shown = "; ".join(f"blocks {group[0]} to {group[-1]}" for group in groups)
        notes.append(f"{self.name()} shared the weights of {shown}" if groups else f"{self.name()} shared nothing")
        return model

    def recur(self, module: Any, rng: torch.Generator) -> list[range]:
        """Share in place, and give each use of a shared block what is its own; returns the groups."""
        self.refuse_adapters(module)
        ways, attentions = self.fitting(module)
        groups = self.share(module)
        stack = module.get_submodule(anatomy_of(module).blocks(module)) if groups else ()
        for group in groups:
            for depth in group:
                again = depth > group[0]
                if ways or self.projection:
                    self.own(module, stack[depth], ways.get(depth, ()), rng)
                if (slices := self.slices_again if again else self.slices) > 1:
                    seed = int(torch.randint(2**31, (), generator=rng)) if again else None
                    SlicedAttention(groups=slices, seed=seed).join(module.get_submodule(attentions[depth]), "slices")
        return groups

    def own(self, module: Any, block: nn.Module, ways: Sequence[tuple[str, str]], rng: torch.Generator) -> None:
        """Let a block have scalars and a projection."""
        like = next(value for value in block.parameters() if value.is_floating_point())
        width = len(residual_norms(module)[0][1].get_parameter("weight"))
        inner = max(1, round(self.projection * width)) if self.projection else 0
        part = Recursion(features=width, inner=inner, ways=ways, dtype=like.dtype, device=like.device)
        part.begin(rng)
        part.train(block.training).join(block, "recursion")

    def fitting(self, module: Any) -> tuple[dict[int, list[tuple[str, str]]], dict[int, str]]:
        """By depth, what scalars stand at, where there are to be some, and the attention, where it is to be sliced.

        Raises:
            SiteError: blocks are laid out otherwise, or their attention does not let all tokens see all.
        """
        anatomy, sliced = anatomy_of(module), max(self.slices, self.slices_again) > 1
        ways = anatomy.ways(module) if self.residual_scales and self.loops > 1 else {}
        attentions = {branch.depth: branch.module for branch in anatomy.branches(module) if branch.kind == "attn"} if sliced else {}
        causal = [path for path in attentions.values() if getattr(module.get_submodule(path), "is_causal", True)]
        if causal:
            raise SiteError(f"{self.name()}: the tokens of {causal[0]} see earlier ones alone, and slices are for those that see all. "
                            "Let slices and slices_again be 1.")  # fmt: skip
        return ways, attentions

    def planned(self, module: Any, donors: int) -> Any:
        self.recur(module, torch.Generator())
        return module

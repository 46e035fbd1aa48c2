"""W = R·ψ: all weights are read from fewer stored values ψ, by a fixed map R. A method fills in R.

Where R picks whole blocks, as here, the blocks of a group are one tensor after another the same tensor; what is each block's
own, its norms, is small. Gradients of ψ are the sums over all uses, Rᵀ g.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from modelwright.anatomy import anatomy_of, matches
from modelwright.blocks._stored import Described
from modelwright.blocks.experts import fuse_experts, split_experts
from modelwright.core.errors import LayoutError, PlanError, SiteError, refuse
from modelwright.core.method import ModelMethod, Places
from modelwright.core.settings import count
from modelwright.core.sharing import tie, untie

Member = Literal["first", "last", "mean"]


@dataclass(frozen=True, kw_only=True)
class BlockSharer(ModelMethod):
    """Lets groups of consecutive blocks use one block's weights."""

    drops: ClassVar[frozenset[str]] = frozenset({"sparse"})  # a mean fills zeros in

    loops: int = count(2, unit="blocks")  # consecutive blocks that use the same weights; 1 shares nothing
    member: Member = "first"  # whose weights the blocks of a group use: the first's, the last's, or their mean
    spare_first: int = count(1, low=0, unit="blocks")  # at the start, that keep their own
    spare_last: int = count(1, low=0, unit="blocks")  # at the end, that keep their own
    where: Places = None  # roles that are shared; by default all but the norms, each with its bias
    skip: Places = None  # roles that each block keeps for itself
    store: Literal["shared", "dense"] = "shared"  # dense: write every block's copy; saves nothing, loads anywhere

    def groups(self, depths: int) -> list[range]:
        """The groups of so many blocks that share, none of them of one block alone.

        Raises:
            PlanError: no two blocks are left to share.
        """
        if self.loops == 1:
            return []
        stop = depths - self.spare_last
        found = [range(start, min(start + self.loops, stop)) for start in range(self.spare_first, stop, self.loops)]
        if not any(len(group) > 1 for group in found):
            spared = f"{self.spare_first} at the start and {self.spare_last} at the end keep their own"
            raise PlanError(f"{self.name()}: of {depths} blocks, {spared}, so that no two are left to share. Spare fewer.")
        return [group for group in found if len(group) > 1]

    def share(self, module: nn.Module, stay: Sequence[int] | None = None) -> list[range]:
        """Share in place between all blocks, or those that `stay`; returns the groups, by their places among these."""
        stack = anatomy_of(module).blocks(module)
        if stack is None:
            raise LayoutError(f"{self.name()} shares between consecutive blocks; this model has no single row of them.")
        depths = range(len(list(module.get_submodule(stack).children()))) if stay is None else stay
        groups = self.groups(len(depths))
        split = split_experts(module) if groups else []  # stacks cannot be shared matrix by matrix
        names = {place: self.chosen(module, f"{stack}.{depths[place]}.", place) for group in groups for place in group}
        of_groups = [{depths[place]: names[place] for place in group} for group in groups]
        if faults := [fault for group in of_groups if (fault := self._fault(module, stack, group))]:
            for path in split:
                experts: Any = module.get_submodule(path)
                module.set_submodule(path, experts.to_fused())
            refuse(SiteError, faults)
        for group in of_groups:
            self._tie(module, [f"{stack}.{depth}." for depth in group], next(iter(group.values())))
        if self.store == "dense":
            untie(module)
            fuse_experts(module)
        return groups

    def chosen(self, module: nn.Module, prefix: str, depth: int) -> list[str]:
        """The names, inside a block, of the parameters that it is to share."""
        anatomy, found = anatomy_of(module), []
        for name, _ in module.get_submodule(prefix[:-1]).named_parameters():
            role = (anatomy.role(prefix + name) or ("",))[0]
            taken = matches(role, depth, self.where) if self.where else role != "norm"
            if taken and not (self.skip and matches(role, depth, self.skip)):
                found.append(name)
        return found

    def _fault(self, module: nn.Module, stack: str, group: dict[int, list[str]]) -> str:
        """Why the blocks of a group, with the names that they are to share, cannot; as a sentence; "" if they can."""
        first = next(iter(group))
        if not group[first]:
            return f"{self.name()}: where={self.where!r} skip={self.skip!r} chooses no weight of block {first}."
        shapes = [{name: module.get_parameter(f"{stack}.{depth}.{name}").shape for name in names} for depth, names in group.items()]
        for depth, found in zip(group, shapes, strict=True):
            if stored := self.stored(module, f"{stack}.{depth}"):
                return stored
            if found != shapes[0]:
                odd = next(name for name in (*shapes[0], *found) if shapes[0].get(name) != found.get(name))
                sizes = " and ".join(str(list(each[odd])) if odd in each else "none" for each in (shapes[0], found))
                return f"{self.name()}: blocks {first} and {depth} differ in {odd}: {sizes}. Spare one of them, or skip that part."
        return ""

    def stored(self, module: nn.Module, path: str) -> str:
        """Why a block has matrices of its own form, which cannot be shared, as a sentence; "" if it has none."""
        for name, layer in module.get_submodule(path).named_modules():
            if isinstance(layer, Described):
                kind = type(layer).__name__
                return f"{self.name()}: {name} of block {path.rpartition('.')[2]} is a {kind}. Share first, then prune, factor or pack."
        return ""

    @torch.no_grad()
    def _tie(self, module: nn.Module, prefixes: Sequence[str], names: Sequence[str]) -> None:
        for name in names:
            values = [module.get_parameter(prefix + name) for prefix in prefixes]
            values[0].copy_(combined(values, self.member))
        tie(module, {prefix + name: prefixes[0] + name for prefix in prefixes[1:] for name in names})

    def planned(self, module: Any, donors: int) -> Any:
        self.refuse_adapters(module)
        self.share(module)
        return module

    def refuse_adapters(self, module: nn.Module) -> None:
        """Raise PlanError where blocks bear adapters, which would be shared too."""
        if hasattr(module, "get_base_model"):
            raise PlanError(f"{self.name()}: the model bears adapters. Fold them first, or share before they are attached.")


def combined(values: Sequence[Tensor], member: Member) -> Tensor:
    """The tensor that stands for all of these: the first, the last, or their mean."""
    if member == "mean":
        return torch.stack([value.detach().float() for value in values]).mean(0).to(values[0].dtype)
    return values[0 if member == "first" else -1].detach()

"""Where a factor can be moved between matrices without changing what the model computes.

Inputs of a matrix can be multiplied by s if what makes them is divided by s. Norms make those of q, k, v and of gate and up; v makes
those of o where every head has its own v; up makes those of down where a gate multiplies it. `smooth` (2211.10438), AWQ
(2306.00978) and BitStack (2410.23918) differ only in s.
"""

from __future__ import annotations

from collections.abc import Container
from typing import Any, NamedTuple

import torch
from torch import Tensor

from modelwright.core.errors import SiteError

from ._base import READS, Site, input_dim
from ._find import anatomy_of
from ._rotation import residual_norms
from .reorder import movable

GATED = {"mlp.gate", "mlp.gate_up"}


class Fold(NamedTuple):
    """Matrices of a block that read the same inputs, and what makes these."""

    kind: str  # "norm", "value" or "up"
    depth: int
    readers: tuple[Site, ...]
    makers: tuple[tuple[str, int, Tensor], ...]  # tensor, dimension and for each input [in] the place of what makes it
    offset: float  # the makers are of a norm that multiplies by offset + weight
    scope: str  # of the module whose outputs show what changed readers do: the attention, the MLP, the block or the matrix itself


def folds(module: Any) -> list[Fold]:
    """Every fold of a model's blocks, in the order of the blocks; works on empty modules too. What several blocks share is left out."""
    anatomy = anatomy_of(module)
    stack = anatomy.blocks(module)
    if stack is None:
        return []
    several = {name for same in anatomy.tied(module) for name in same}
    shapes = {name: value.shape for name, value in module.named_parameters() if name not in several}
    behind = anatomy.norms_write or getattr(module.config, "do_layer_norm_before", True) is False
    found = [] if behind else _norm_folds(module, stack, shapes)
    for where in movable(module).values():
        fold = _inner_fold(module, where, shapes)
        if fold is not None:
            found.append(fold)
    return sorted(found, key=lambda fold: (fold.depth, ["norm", "value", "up"].index(fold.kind)))


def _norm_folds(module: Any, stack: str, shapes: dict[str, Any]) -> list[Fold]:
    """Of norms that stand before attentions and MLPs, as children of their block: those behind them write to the stream too."""
    anatomy = anatomy_of(module)
    norms = [path for path, _ in residual_norms(module)]
    sites = [site for site in anatomy.sites(module) if site.role in READS and site.name in shapes and site.depth is not None]
    found = []
    for depth in range(len(module.get_submodule(stack))):
        prefix = f"{stack}.{depth}."
        own = [path for path in norms if path.startswith(prefix) and "." not in path.removeprefix(prefix)]
        if len(own) not in (1, 2, 4):  # with more of them, which serves what is not known
            continue
        half = len(own) // 2
        first = own if len(own) == 1 else [*own[:half][:1], *own[half:][:1]]
        readers_of: dict[str, list[Site]] = {path: [] for path in first}
        for site in sites:
            behind_another = site.module.endswith(".b")  # the second of two factors reads the first
            if site.name.startswith(prefix) and first and "cross" not in site.role and not behind_another:
                readers_of[first[0] if site.role.startswith("attn") else first[-1]].append(site)
        for path, readers in readers_of.items():
            names = [name for name in (f"{path}.weight", f"{path}.bias") if name in shapes]
            if not readers or not names or any(site.stack for site in readers):
                continue
            owners = {anatomy.owner(site) for site in readers}
            places = torch.arange(shapes[names[0]][0])
            makers = tuple((name, 0, places) for name in names)
            scope = owners.pop() if len(owners) == 1 else prefix[:-1]
            found.append(Fold("norm", depth, tuple(readers), makers, anatomy.norm_offset, scope))
    return found


def _inner_fold(module: Any, where: Any, shapes: dict[str, Any]) -> Fold | None:
    """Of the last matrix of an attention or MLP."""
    site, anatomy = where.site, anatomy_of(module)
    copies = where.inputs.shape[1]
    if site.depth is None or site.stack or "cross" in site.role:
        return None
    inputs = where.inputs.permute(1, 0, 2).reshape(copies, -1)  # [copies, runs · width]
    if site.role == "attn.o":
        if copies > 1:
            return None
        makers, kind = where.makers, "value"
    else:
        gated = [one for one in anatomy.sites(module) if anatomy.owner(one) == anatomy.owner(site) and one.role in GATED]
        if not gated:
            return None
        # Of a fused weight the second run of rows is up; apart, the tensors whose role it is.
        makers = where.makers if gated[0].role == "mlp.gate" else where.makers[len(where.makers) // 2 :]
        makers, kind = tuple(one for one in makers if (anatomy.role(one[0]) or ("",))[0] != "mlp.gate"), "up"
    order = inputs[0].argsort()
    return Fold(kind, site.depth, (site,), tuple((name, dim, places.flatten()[order]) for name, dim, places in makers), 0.0, site.module)


def movable_mean(fold: Fold, names: Container[str]) -> bool:
    """Whether something can be taken from the readers' inputs too: a norm with a bias makes them, and biases of the readers take it."""
    return fold.kind == "norm" and all(name in names for name in [bias_of(fold), *(f"{site.module}.bias" for site in fold.readers)])


def bias_of(fold: Fold) -> str:
    """The name of the bias of what makes a fold's inputs, "" without one."""
    return next((name for name, _, _ in fold.makers if name.endswith("bias")), "")


@torch.no_grad()
def apply_shift(module: Any, fold: Fold, shift: Tensor) -> None:
    """Take `shift` [in] from the readers' inputs, W x + b = W (x - shift) + (b + W shift): out of the norm's bias, into theirs.

    Where `movable_mean`; in float32 at least, and back to each dtype. Of RepQ-ViT (2212.08254) the part without scales.
    """
    for site in fold.readers:
        weight, bias = wide(module.get_parameter(site.name)).movedim(input_dim(site), -1), module.get_parameter(f"{site.module}.bias")
        bias.copy_(wide(bias) + weight @ shift.to(weight))
    held = module.get_parameter(bias_of(fold))
    held.copy_(wide(held) - shift.to(held.device))


def wide(tensor: Tensor) -> Tensor:
    """In float32, or float64 where it is that."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


@torch.no_grad()
def apply_fold(module: Any, fold: Fold, factor: Tensor) -> None:
    """Multiply the readers' inputs by `factor` [in] above 0, and divide what makes them; in float32 at least, and back to each dtype.

    Raises:
        SiteError: a product or quotient is too large for its dtype; nothing is changed then.
    """
    made: list[tuple[str, Tensor, int, Tensor]] = []
    for site in fold.readers:
        weight, dim = module.get_parameter(site.name), input_dim(site)
        every = torch.arange(weight.shape[dim], device=weight.device)
        made.append((site.name, (wide(weight).movedim(dim, -1) * factor.to(weight.device)).movedim(-1, dim).to(weight.dtype), dim, every))
    for name, dim, places in fold.makers:
        held, offset = module.get_parameter(name), fold.offset if name.endswith("weight") else 0.0
        places = places.to(held.device)
        old = wide(held.index_select(dim, places)).movedim(dim, -1)
        made.append((name, ((old + offset) / factor.to(held.device) - offset).movedim(-1, dim).to(held.dtype), dim, places))
    if bad := [name for name, values, _, _ in made if not values.isfinite().all()]:
        raise SiteError(f"{bad[0]} would overflow with the scales of its inputs' channels. Use a wider dtype, or leave it out with `skip`.")
    for name, values, dim, places in made:
        module.get_parameter(name).index_copy_(dim, places, values)
